"""One HTML page that shows an analysis."""
