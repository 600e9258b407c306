"""What a direction promotes by the direct path."""
