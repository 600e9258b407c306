"""From a run to the files of another tool, and back; one format a file."""
