"""Sparse autoencoders: the architectures, the sparse operators that they share, runs on disk."""
