"""From a code store to an analysis; the analysis opened for looking."""
