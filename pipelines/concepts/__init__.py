"""How well do features follow labels of the text? Labels, rules and unions of features, probes, absorption; the stage."""
