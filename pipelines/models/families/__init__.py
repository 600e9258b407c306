"""Decoder families, one a file."""
