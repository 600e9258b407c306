"""What predictions owe to features."""
