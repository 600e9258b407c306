"""Small real things that tests of the stages share: a tiny GPT-2 with its own tokenizer, text, and a command runner.

The model has random weights with outlier channels and a large first position planted, as trained GPT-2s have them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pipelines.collect.config import CollectConfig

ROOT = Path(__file__).resolve().parents[2]
END_OF_TEXT = "<|endoftext|>"
N_LAYER, D_MODEL, N_POSITIONS = 3, 32, 64


def write_texts(folder: Path, n_files: int = 24) -> Path:
    """Some files of small stories, each different; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    animals, places = ("fox", "hare", "owl", "newt", "mole"), ("wood", "field", "river", "barn")
    for i in range(n_files):
        lines = [
            f"The {animals[(i + j) % 5]} {i * 31 + j} went to the {places[(i * j) % 4]}, "
            f"and saw {j + 25} friends — “déjà vu”.\n"
            for j in range(8 + i % 7)
        ]
        (folder / f"story{i:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def build_model(folder: Path, texts: Path, *, seed: int = 0, outliers: bool = True) -> Path:
    """A GPT-2 of 3 blocks x 32 with a byte-level BPE of 400 tokens, saved as a transformers folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train(
        [str(path) for path in sorted(texts.glob("*.txt"))],
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=N_POSITIONS,
        n_embd=D_MODEL,
        n_layer=N_LAYER,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    if outliers:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_proj.bias[[3, 17]] = torch.tensor([40.0, -25.0])
            model.transformer.wpe.weight[0] *= 30
    model.save_pretrained(folder)
    return folder


def plant(model: Path, out: Path, weight: str, row: int | str, value: float) -> int:
    """A copy of a model with one value set in channel 5 of a row of a weight, given by number or by token; gives its number.

    In a weight that is a vector, the row is the channel.
    """
    shutil.copytree(model, out)
    if isinstance(row, str):
        (row,) = Tokenizer.from_file(str(out / "tokenizer.json")).encode(row, add_special_tokens=False).ids
    weights = load_file(out / "model.safetensors")
    weights[weight][(row, 5) if weights[weight].ndim == 2 else row] = value
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return row


def folder_state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """(time of last change, content) of every file and folder: equal states mean that nothing was written or lost."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def records_of(store: Path) -> dict[str, bytes]:
    """The commit record of every shard there is."""
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.glob("commits/*/*/*.json")}


def faults_in(store: Path) -> list[str]:
    """All that is not as it was committed."""
    from actstore.integrity import find_faults
    from actstore.open_place import open_place

    return [str(fault) for fault in find_faults(open_place(store))]


def collect_and_die(config: CollectConfig, n_operations: int) -> None:
    """`collect`, killed by SIGKILL when about to do its n-th thing to a file of the store. For a process of its own."""
    from pipelines.collect.stage import collect

    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    left = itertools.count(n_operations - 1, -1)

    def count(event: str, arguments: tuple[object, ...]) -> None:
        counted = event in {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"}
        if counted and str(arguments[0]).startswith(str(config.out)) and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    collect(config)


def run_cli(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python cli.py …` in a process of its own, offline."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
