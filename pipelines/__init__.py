"""What is done with a store of activations: a room for each subject, in the order of docs/ARCHITECTURE.md."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

MOVED = {
    "pipelines.corpus": "pipelines.text.corpus",
    "pipelines.causal.ablation": "pipelines.causal.ablate.feature_edits",
    "pipelines.causal.subject": "pipelines.causal.engine.language_model",
}
"""Modules that pages of earlier versions told users to import -> where they are."""


class _Moved(MetaPathFinder):
    """Says where a module went; asked only for modules that are not there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname in MOVED:
            raise ModuleNotFoundError(f"{fullname}: is {MOVED[fullname]} now; import that.", name=fullname)


sys.meta_path.append(_Moved())
