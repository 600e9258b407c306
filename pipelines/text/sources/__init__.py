"""In: a file or a dataset. Out: its documents, in pieces that can be read in any order; one kind of source a file."""
