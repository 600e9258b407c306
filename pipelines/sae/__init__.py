"""Sparse autoencoders: the architectures, their sparse kernels, and the checkpoints of training runs."""
