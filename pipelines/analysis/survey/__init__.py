"""What the tasks of `analyze` compute, and leave beside the result until it is whole."""
