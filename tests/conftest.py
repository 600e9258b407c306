"""Fixtures that several test files share. A synthetic store needs none: see `storekit.py`."""
