"""From a store to one run or many."""
