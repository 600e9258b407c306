"""Measures that several stages use: losses of a model under replacements, directions compared."""
