"""Training SAEs: one SAE and its optimiser, the pass over the store that feeds several, and what survives a kill."""
