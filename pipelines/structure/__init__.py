"""Do features fire together in a meaningful pattern? Pairs, communities and implications against a null, on two halves."""
