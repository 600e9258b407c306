"""Documents, tokens, windows, and the text behind a row."""
