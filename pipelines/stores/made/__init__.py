"""Stores whose truth is known, because it was made: for tests and benchmarks."""
