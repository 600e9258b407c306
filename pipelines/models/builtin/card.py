"""Writes the model card of the built-in model: its shape, training data, quality, and how to make it.

`python -m pipelines.models.builtin.card OUT` rewrites the card from a finished training folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pipelines.models.builtin.bits import BitsReport, measure

CARD = """\
# Built-in model

A GPT-2 (`GPT2LMHeadModel`) of {n_parameters:,} parameters, trained from scratch on nothing but the Python
{python_version} standard library.  It is shipped so that every example and test runs without a download.

| what | value |
| --- | --- |
| shape | {n_layer} layers, width {n_embd}, {n_head} heads, {window_tokens} positions, tied embeddings |
| tokenizer | byte-level BPE, {n_vocab} tokens, trained on the training modules only |
| `<\\|endoftext\\|>` | id 0, begin and end of text; every document begins with it |
| weights | fp16, {weight_mb:.1f} MB |
| training data | {n_train_documents} modules, {n_train_tokens:,} tokens |
| tokens seen | {tokens_seen:,} ({n_passes:.1f} passes, {steps} steps of {batch_windows} windows) |
| time | {minutes:.0f} minutes on {threads} CPU cores, bfloat16 autocast |
| optimizer | Muon (rate {muon_lr}) for the blocks' matrices, AdamW (rate {adam_lr}) for the rest |

## Data

The `.py` files of the CPython {python_version} standard library without tests, bundled packages and tables
that a machine wrote (`pipelines/shared/stdlib_sources.py` holds the rule).  They are split by top-level package into train,
dev and test; `data.json` lists every module with the SHA-256 of its bytes.  Neither the tokenizer, the model
nor the n-gram models below have seen dev or test.  Learning rates were compared on
dev; no choice was made by test.

## Bits per byte on the test modules

```
{table}
```

Context 256 tokens, stride 128: each token is scored once, with 129 tokens or more to its left where its
document has them.  The n-gram models are interpolated modified Kneser–Ney on the same training tokens.
`python -m pipelines.models.builtin.bits` prints this table.

## How it was made

```
{command}
```

{schedule}Seed {seed}; bfloat16 sums differ between processors, so another machine gives other weights of the same
quality.

## Limits

It has read one code base: it writes Python in the style of the standard library, knows little English and
no other language, and its text is not to be relied on.  It repeats fragments of its training files, which
are under the licence below.  It is meant for trying out tools on a real, small, trained transformer.

## Licence

The training data are part of CPython, under the Python Software Foundation License Version 2.  The weights
and the code that made them are under the MIT licence, as this project.
"""


def command_line(config: dict) -> str:
    """The training command with every option of its command line."""
    integers = ["steps", "seed", "batch_windows", "threads", "warmup_steps"]
    names = [*integers, "muon_lr", "adam_lr", "weight_decay", "dropout"]
    options = " ".join(f"--{name.replace('_', '-')} {config[name]}" for name in names)
    return f"python -m pipelines.models.builtin.train --out builtin_out {options}"


def schedule_text(segments: list[list[int]]) -> str:
    """A sentence about a training that was resumed with another number of steps; else empty.

    `segments` lists `[first step, steps of the schedule]`.
    """
    if len(segments) < 2:
        return ""
    parts = [f"for {steps} steps from step {first}" for first, steps in segments]
    return f"The rate's linear decay to 0 was planned {', and then '.join(parts)} (`--resume`).\n"


def card_text(folder: Path, run: dict, report: BitsReport) -> str:
    """The card of the model in `folder`, from the training run's record and the measured bits."""
    from safetensors.torch import load_file

    weights = folder / "model.safetensors"
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return CARD.format(
        **run["config"],
        n_parameters=sum(tensor.numel() for tensor in load_file(weights).values()),
        python_version=record["python_version"],
        weight_mb=weights.stat().st_size / 1e6,
        n_train_documents=len(record["train"]),
        n_train_tokens=run["train_tokens"],
        tokens_seen=run["tokens_seen"],
        n_passes=run["tokens_seen"] / run["train_tokens"],
        minutes=run["seconds"] / 60,
        table=report.table(),
        command=command_line(run["config"]),
        schedule=schedule_text(run.get("segments", [])),
    )


def write_card(folder: Path, run: dict) -> BitsReport:
    """Measure the model in `folder` on the test modules, write its `README.md`, return the measurement."""
    report = measure(folder)
    (folder / "README.md").write_text(card_text(folder, run, report), encoding="utf-8")
    print(report.table(), flush=True)
    return report


def main() -> None:
    """Read the command line and write the card."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.models.builtin.card", description=__doc__)
    parser.add_argument("out", type=Path, help="the finished training folder, holding run.json and model/")
    out = parser.parse_args().out
    write_card(out / "model", json.loads((out / "run.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
