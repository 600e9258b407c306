"""`evaluate` beside SAELens' own evaluation: the same SAE, model and tokens, two programs.

    python -m benchmarks.evaluate_parity --saelens-python saelens/bin/python [--work FOLDER] [--json]

Collects two small stores of the built-in model and trains a TopK SAE on each, exports both to SAELens' format, and lets its
`run_evals` and ours measure them on the same held-out windows. Where the definitions are the same, the figures have to
agree to 1e-3, of the figure where it is above 1; the exit status says whether they do.

`all positions`: a store with `--keep-special`, SAELens with `exclude_special_tokens=False`. Its divergence is over all
positions, ours over those that have a next token; compared is the mean of its `get_recons_loss` over the same ones.

`without special ones`: the defaults of both. Figures of rows are the same; those of text are not: SAELens zeroes all
positions where we zero the replaced ones, and leaves the predictions at special tokens out of the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from actstore.reader import ActivationStore
from benchmarks.peers.environments import run_script
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.metrics.model_loss import heldout_windows, reconstructing, text_metrics
from pipelines.models.capture import capture
from pipelines.models.load import load_model
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import load_run
from pipelines.sae.reconstruction_metrics import RowMetrics
from pipelines.text.windows import Windows
from pipelines.train.config import TrainConfig
from pipelines.train.stage import train

LAYER, CONTEXT, N_WINDOWS, BATCH_WINDOWS = 2, 64, 96, 16
TOLERANCE = 1e-3
ROWS = {
    "fve": "explained_variance",
    "l0": "l0",
    "cosine": "cossim",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "squared_error": "mse",  # SAELens: summed over the d values of a row
    "dead_features": "dead_features",
    "dense_features": "dense_features",
}
"""Our name of a figure of rows, and SAELens'."""
TEXT = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "ce_loss_score": "ce_loss_score",
    "kl": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
    "kl_score": "kl_div_score",
}


def save_model(folder: Path) -> Path:
    """The built-in model as any other transformers folder, in fp32 and with the name TransformerLens knows its GELU by."""
    from transformers import AutoTokenizer

    from pipelines.models.builtin import model_path

    model: Any = load_model("builtin", "cpu", "fp32")
    model.config.activation_function = "gelu_new"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


def export(sae: Sae, folder: Path, hook_name: str, context: int) -> Path:
    """A TopK SAE as SAELens 6.54 keeps it."""
    folder.mkdir()
    weights = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, folder / "sae_weights.safetensors")
    config = {
        **{"architecture": "topk", "d_in": sae.d_model, "d_sae": sae.n_features, "k": sae.k, "dtype": "float32"},
        **{"device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"},
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            **{"sae_lens_version": "6.54.12", "model_name": "local", "hook_name": hook_name, "context_size": context},
            **{"prepend_bos": True, "dataset_path": "local"},
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def whole_windows(store: ActivationStore) -> tuple[Windows, NDArray[np.int64]]:
    """The first held-out windows that fill the context: SAELens knows no padding."""
    (windows,) = heldout_windows(store)
    full = np.flatnonzero(windows.n_tokens + int(windows.policy.bos) == windows.policy.context)
    return windows, full[:N_WINDOWS]


def ours(sae: Sae, model: torch.nn.Module, site: Site, windows: Windows, chosen: NDArray[np.int64]) -> dict[str, Any]:
    """Our figures of the kept positions of some windows."""
    rows = RowMetrics.empty(sae.d_model, sae.n_features)
    batches = [(windows, chosen[start : start + BATCH_WINDOWS]) for start in range(0, len(chosen), BATCH_WINDOWS)]
    for _, part in batches:
        inputs, kept = windows.batch(part)
        x = capture(model, [site], torch.from_numpy(inputs))[site.label][torch.from_numpy(kept)]
        codes = sae.codes(x)
        rows.update(x, sae.reconstruct(codes), codes.active.features[codes.values > 0])
    replacements = {
        "sae": reconstructing(sae),
        "zero": torch.zeros_like,
        "mean": lambda x: torch.from_numpy(rows.total / rows.n_rows).float().expand_as(x),
    }
    text = text_metrics(model, site, batches, replacements, "cpu")
    found = rows.finalize()
    return {**found, "squared_error": found["mse"] * sae.d_model, "n_rows": rows.n_rows, **text.finalize()}


def theirs(python: Path, model: Path, sae: Path, tokens: Path, *, keep_special: bool) -> dict[str, Any]:
    """SAELens' figures, by its own Python."""
    options = ["--model", model, "--sae", sae, "--tokens", tokens, *(["--keep-special"] if keep_special else [])]
    return run_script(python, "saelens_evaluate", *options)


def of_next_tokens(found: dict[str, Any]) -> dict[str, float]:
    """SAELens' figures of text with its means taken over the positions that have a next token."""
    own: dict[str, float] = dict(found["next_token"])
    clean, sae, zero = (own[f"ce_loss_{name}"] for name in ("without_sae", "with_sae", "with_ablation"))
    kl, kl_zero = own["kl_div_with_sae"], own["kl_div_with_ablation"]
    return {**own, "ce_loss_score": (zero - sae) / (zero - clean), "kl_div_score": (kl_zero - kl) / kl_zero}


def compared(
    ours_: dict[str, Any], theirs_: dict[str, Any], names: dict[str, str], *, is_same: bool
) -> list[dict[str, Any]]:
    """One line a figure: both values, their difference, and whether it is small; None where the definitions differ."""
    rows = []
    for mine, other in names.items():
        a, b = float(ours_[mine]), float(theirs_[other])
        agrees = abs(a - b) <= TOLERANCE * max(1.0, abs(b)) if is_same else None
        rows.append({"figure": mine, "saelens_name": other, "ours": a, "saelens": b, "difference": a - b, "agrees": agrees})
    return rows


def measure(work: Path, python: Path, n_tokens: int, *, keep_special: bool) -> dict[str, Any]:
    """Collect, train, export, and evaluate twice."""
    name = "all" if keep_special else "usual"
    model_folder = work / "model"
    if not model_folder.exists():
        save_model(model_folder)
    store_path, run, tokens = work / f"{name}.store", work / f"{name}-run", work / f"{name}.npy"
    config = CollectConfig(
        out=store_path, model=str(model_folder), layer=(LAYER,), tokens=n_tokens, context=CONTEXT, keep_special=keep_special
    )
    collect(config)
    store = ActivationStore(store_path)
    train(TrainConfig(store=store_path, out=run, features=1024, k=16, batch=1024, epochs=1, device="cpu"))
    sae, _ = load_run(run)
    windows, chosen = whole_windows(store)
    inputs, kept = windows.batch(chosen)
    np.save(tokens, inputs)
    exported = export(sae, work / f"{name}-saelens", f"blocks.{LAYER}.hook_resid_post", CONTEXT)
    model = load_model(str(model_folder), "cpu", "fp32")
    mine = ours(sae, model, Site("resid_post", LAYER), windows, chosen)
    other = theirs(python, model_folder, exported, tokens, keep_special=keep_special)
    rows = compared(mine, other, ROWS, is_same=True)
    if keep_special:
        ce = {own: name for own, name in TEXT.items() if own.startswith("ce")}
        rows += compared(mine, other, ce, is_same=True)
        kl = {own: name for own, name in TEXT.items() if own.startswith("kl")}
        rows += [
            {**row, "saelens_name": f"{row['saelens_name']}, next-token positions"}
            for row in compared(mine, of_next_tokens(other), kl, is_same=True)
        ]
        rows += [
            {**row, "saelens_name": f"{row['saelens_name']}, all positions"}
            for row in compared(mine, other, kl, is_same=False)
        ]
    else:
        rows += compared(mine, other, TEXT, is_same=False)
    return {
        "positions": "all positions" if keep_special else "without special ones",
        "windows": len(chosen),
        "rows": int(kept.sum()),
        "sae_lens": other["sae_lens"],
        "figures": rows,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """A table of one comparison."""
    verdict = {True: "", False: "  DIFFERS", None: "  defined otherwise"}
    return [
        f"{found['positions']}: {found['windows']} windows, {found['rows']:,} rows, SAELens {found['sae_lens']}",
        f"  {'figure':<30}{'ours':>12}{'SAELens':>12}{'difference':>12}  SAELens' name",
        *(
            f"  {row['figure']:<30}{row['ours']:>12.5f}{row['saelens']:>12.5f}{row['difference']:>+12.1e}  "
            f"{row['saelens_name']}{verdict[row['agrees']]}"
            for row in found["figures"]
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--saelens-python", type=Path, required=True, metavar="PYTHON", help="of an environment with SAELens"
    )
    parser.add_argument("--tokens", type=int, default=150_000, help="of text in each of the two stores")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is made here; must be free")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary) / "work").absolute()
        work.mkdir(parents=True)
        python = options.saelens_python.absolute()
        found = [measure(work, python, options.tokens, keep_special=keep_special) for keep_special in (True, False)]
    print(json.dumps(found, indent=1) if options.json else "\n".join(line for own in found for line in lines(own)))
    if any(row["agrees"] is False for own in found for row in own["figures"]):
        sys.exit("the two evaluations differ where their definitions are the same")


if __name__ == "__main__":
    main()
