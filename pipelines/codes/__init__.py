"""From a store and a run to a code store, indexed by feature."""
