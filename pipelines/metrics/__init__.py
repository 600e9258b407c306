"""Measures that several stages use: a model's losses under replacements, and comparisons of directions."""
