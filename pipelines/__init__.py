"""Runnable pipelines over text that every machine already has: the Python standard library."""
