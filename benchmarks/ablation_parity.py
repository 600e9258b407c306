"""Logits of ablated features against TransformerLens on the same weights.

    python -m benchmarks.ablation_parity demo-out --transformerlens-python PYTHON

takes a finished demo of the built-in model. Every feature that fires in some prompts is set to 0, with the error term kept
and with it dropped, here and in TransformerLens (no weight processing; `benchmarks.peers.transformerlens_ablate`); the
logits at the last position are compared. Fails where any differs by more than 1e-4.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from pipelines.shared.environment import set_environment

set_environment()  # before torch is loaded, as the commands do

from safetensors.torch import load_file  # noqa: E402

from benchmarks.evaluate_parity import save_model  # noqa: E402
from benchmarks.peers.environments import run_script  # noqa: E402
from pipelines.causal.ablate.feature_edits import ablate, read_prompt, set_everywhere  # noqa: E402
from pipelines.causal.engine.language_model import Spliced, open_spliced  # noqa: E402
from pipelines.sae.checkpoint import WEIGHTS  # noqa: E402

PROMPTS = (
    'def load(path, mode):\n    """',
    "import os\nimport sys\n\nfor name in os.listdir(",
    "class Reader:\n    def __init__(self, stream):\n        self.stream = stream\n        self.",
    "try:\n    import json\nexcept ImportError:\n    # not",
)
TOLERANCE = 1e-4


def compare(spliced: Spliced, run: Path, python: Path, work: Path) -> dict[str, Any]:
    """The largest differences over all prompts and features, by what becomes of the error term."""
    reads = [read_prompt(spliced, spliced.lm.prompt(text)) for text in PROMPTS]
    asked = [{"ids": r.prompt.ids.tolist(), "kept": r.prompt.kept.tolist(), "features": r.features.tolist()} for r in reads]
    prompts, out = work / "prompts.json", work / "logits.safetensors"
    prompts.write_text(json.dumps(asked))
    options: list[Any] = ["--model", save_model(work / "model")]
    options += ["--sae", (run / WEIGHTS).absolute(), "--k", spliced.record.k, "--prompts", prompts, "--out", out]
    options += ["--hook", f"blocks.{spliced.site.layer}.hook_{spliced.site.name}"]
    said = run_script(python, "transformerlens_ablate", *options)
    theirs = load_file(out)
    worst = {"keep": 0.0, "drop": 0.0}
    for error in worst:
        for i, read in enumerate(reads):
            found = ablate(read, [set_everywhere(read, feature) for feature in read.features.tolist()], error)
            worst[error] = max(worst[error], float((read.logits(found.hidden) - theirs[f"{error}_{i}"]).abs().max()))
    n = sum(len(own["features"]) for own in asked)
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    return {**said, "ablations": n, "difference": worst, "largest_logit": largest}


@click.command(help=__doc__)
@click.argument("demo", type=click.Path(path_type=Path))
@click.option("--transformerlens-python", "python", required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def main(demo: Path, python: Path, as_json: bool) -> None:
    run = demo / "run"
    with tempfile.TemporaryDirectory() as work:
        found = compare(open_spliced(run, demo / "store", device="cpu"), run, python.absolute(), Path(work))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"{found['ablations']} ablations in {len(PROMPTS)} prompts, TransformerLens {found['transformer_lens']}: "
            f"largest difference of a logit {found['difference']['keep']:.1e} (error term kept), "
            f"{found['difference']['drop']:.1e} (dropped); largest logit {found['largest_logit']:.1f}"
        )
    if max(found["difference"].values()) > TOLERANCE:
        sys.exit(f"differs by more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
