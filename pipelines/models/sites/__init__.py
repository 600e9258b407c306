"""Places in a model that are read and edited, one kind a file."""
