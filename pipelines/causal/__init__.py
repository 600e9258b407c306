"""What features and components do: interventions on a language model, and exact attributions of its logits."""
