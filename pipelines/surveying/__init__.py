"""The parts of `analyze`: what its tasks do, and what they leave beside the result until it is whole."""
