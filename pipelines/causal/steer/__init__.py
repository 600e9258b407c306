"""Text written while a feature is changed."""
