"""Which features do runs share? Decoder directions matched, firings on the same rows correlated; the stage."""
