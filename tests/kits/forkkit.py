"""Processes of their own that start fast: what they need is imported once, in the server they are forked from."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")

_preloaded: set[str] = set()


def preload(*modules: str) -> None:
    """Have the server import these, too; there is one server, and naming its modules anew forgets the others'."""
    _preloaded.update(modules)
    PROCESSES.set_forkserver_preload(sorted(_preloaded))
