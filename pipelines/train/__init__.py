"""Training: from a store to one run or many."""
