"""Measurements: each module is a command that prints its figures, `python -m benchmarks.NAME --help`."""
