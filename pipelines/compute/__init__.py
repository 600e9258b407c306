"""How this machine computes: products on its processor, and memory that the process keeps."""
