"""What is done with whole stores: care, a listing, stores made for tests and benchmarks."""
