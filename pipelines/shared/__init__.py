"""What several rooms use and none owns: clusters, progress, the hub, text for a terminal, Parquet, registries."""
