"""What ablating each feature does over the corpus."""
