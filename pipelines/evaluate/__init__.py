"""How well an SAE explains rows, and what it does to new sentences."""
