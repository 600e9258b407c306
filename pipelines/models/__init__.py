"""Language models: loading, families, sites, the forward pass in pieces."""
