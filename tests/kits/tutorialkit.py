"""The code of a tutorial, run as a reader would run it: Python blocks in one session, shell blocks in one folder.

A block is followed by its output in a block without language. `python tests/kits/tutorialkit.py FILE.md` runs a tutorial and
writes the outputs of today in the place of those there.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code in a language (`python` or `sh`), and the output that the tutorial shows, None where it shows none."""

    language: str
    code: str
    shown: str | None


def blocks_of(tutorial: str) -> list[Block]:
    """The blocks of a tutorial's text that are run."""
    return [Block(*match.groups()) for match in BLOCK.finditer(tutorial)]


def run_blocks(blocks: list[Block], folder: Path) -> list[str]:
    """What each block prints, run one after another. An exception, or a command that fails, ends it."""
    names: dict[str, object] = {"__name__": "__main__"}
    outputs = []
    for number, block in enumerate(blocks):
        if block.language == "sh":
            outputs.append(_shell(block.code, folder))
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block.code, f"block {number}", "exec"), names)
        outputs.append(printed.getvalue())
    return outputs


def _shell(code: str, folder: Path) -> str:
    """A shell block in which `actstore` is the checkout's, offline."""
    function = f'actstore() {{ "{sys.executable}" "{ROOT / "cli.py"}" "$@"; }}\nset -e\n'
    found = subprocess.run(
        ["bash", "-c", function + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"{code}\n{found.stdout}\n{found.stderr}"
    return found.stdout


def with_outputs(tutorial: str, outputs: list[str]) -> str:
    """A tutorial's text with these outputs in place of those that it shows."""
    left = iter(outputs)

    def filled(match: re.Match[str]) -> str:
        language, code, shown = match.groups()
        output = re.sub(r"[ \t]+$", "", next(left), flags=re.MULTILINE).strip("\n")
        return f"```{language}\n{code}```\n" + ("" if shown is None else f"```\n{output}\n```\n")

    return BLOCK.sub(filled, tutorial)


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as workplace:
        os.chdir(workplace)
        path.write_text(with_outputs(text, run_blocks(blocks_of(text), Path(workplace))), encoding="utf-8")
