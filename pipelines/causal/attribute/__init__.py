"""Which parts make a logit."""
