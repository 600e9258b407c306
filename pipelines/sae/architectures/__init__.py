"""The SAE architectures, one per file."""
