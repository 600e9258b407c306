"""The environments of other projects, and runs of the scripts in this folder in them.

    FOLDER/saelens  FOLDER/dictionary_learning  FOLDER/sparsify

each made by `python -m venv` and pip with the same torch as this project's. Pip's own configuration decides from where it is
fetched; a build for CUDA takes some gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "saelens": (("sae-lens==6.54.12", "transformer-lens"),),
    # it asks for 84 packages, nnsight and umap among them; its trainer needs these
    "dictionary_learning": (("einops", "tqdm"), ("--no-deps", "dictionary-learning==0.1.0")),
    "sparsify": (("eai-sparsify==1.3.3",),),
}
"""By environment, what each call of pip installs after torch."""
SCRIPTS = {
    "ours": "ours",
    "textbook": "textbook",
    "bare": "bare_encoder",
    "saelens": "saelens_train",
    "dictionary_learning": "dictionary_learning_train",
    "sparsify": "sparsify_train",
}
"""By peer, the module of this folder that runs it."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "SPARSIFY_DISABLE_TRITON": "1",
}
"""The same for all; torch chooses its threads, and how they wait, but where a script says otherwise."""


class PeerFailed(Exception):
    """A script ended with an error; its last words."""


@dataclass(frozen=True)
class Peers:
    """Which Python runs which peer, and why some are not run."""

    pythons: dict[str, Path]
    skipped: dict[str, str]

    def run(self, peer: str, *options: Any) -> dict[str, Any]:
        """One run of a peer's script; its JSON. Raises PeerFailed."""
        command = [str(self.pythons[peer]), "-m", f"benchmarks.peers.{SCRIPTS[peer]}", *map(str, options)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=False
        )
        if done.returncode:
            raise PeerFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        return dict(json.loads(done.stdout.splitlines()[-1]))


def run_script(python: Path, script: str, *options: Any) -> dict[str, Any]:
    """One run of a script of this folder by another Python; its JSON. What it says on stderr is seen."""
    command = [str(python), "-m", f"benchmarks.peers.{script}", *map(str, options)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def install(folder: Path, name: str) -> Path:
    """Make an environment, unless it is there; its Python."""
    python = folder / name / "bin" / "python"
    finished = folder / name / "installed.json"
    wanted = {"torch": TORCH, "packages": PACKAGES[name]}
    if finished.exists() and json.loads(finished.read_text()) == json.loads(json.dumps(wanted)):
        return python
    print(f"installing {name} into {folder / name}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / name)], check=True)
    keep = folder / name / "keep.txt"
    keep.write_text(f"{TORCH}\n")
    for packages in ((TORCH, "numpy"), *PACKAGES[name]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", str(keep), *packages], check=True)
    finished.write_text(json.dumps(wanted))
    return python


def add_options(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """`--saelens-python` and its like, and `--install`."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}-python", type=Path, metavar="PYTHON", help="of its environment")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make the environments that are not named, there")


def choose(options: argparse.Namespace, names: tuple[str, ...]) -> Peers:
    """The peers that the options name or let be installed; the others are skipped, with a reason."""
    pythons = {name: Path(sys.executable) for name in ("ours", "textbook", "bare")}
    skipped = {}
    for name in names:
        given = getattr(options, f"{name}_python")
        if given is not None:
            pythons[name] = given.absolute()
        elif options.install is not None:
            try:
                pythons[name] = install(options.install.absolute(), name)
            except subprocess.CalledProcessError as error:
                skipped[name] = f"its environment could not be made ({' '.join(map(str, error.cmd))})"
        else:
            skipped[name] = f"pass --{name.replace('_', '-')}-python, or --install"
    return Peers(pythons, skipped)
