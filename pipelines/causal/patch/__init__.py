"""One text's activations in another's run."""
