"""Sparse autoencoders: architectures, the sparse operators that they share, runs on disk."""
