"""Helpers that several rooms use: clusters, progress, the hub, text for a terminal, Parquet, registries."""
