"""The built-in model: a small GPT-2 over Python's standard library, shipped with the package."""

from __future__ import annotations

from pathlib import Path


def model_path() -> Path:
    """The folder that holds the built-in model, for `AutoModelForCausalLM.from_pretrained`."""
    return Path(__file__).resolve().parent / "model"
