"""What `analyze` computes of every code store, one statistic a file."""
