"""How this machine computes: products on its processor, and the memory that it keeps."""
