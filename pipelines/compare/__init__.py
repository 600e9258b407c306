"""What several runs share; superposition, in a toy model and in an SAE."""
