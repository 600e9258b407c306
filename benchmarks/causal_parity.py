"""Causal tools beside TransformerLens': the same weights and texts, two programs.

    python -m benchmarks.causal_parity --transformer-lens-python saelens/bin/python [--texts N] [--json]

Its folding and centring are off. Two models: the built-in one, and a random GPT-2 with biases, a first position 30 times as
large as the others and three outlier channels. Compared are each head's, MLP's and embedding's share of a logit difference
and of a vocabulary-centred logit, and patching grids (denoising) of the raw logit difference. All have to agree to 1e-4 of
the largest value of a figure; the exit status says whether they do.

A comparison is a function of (work folder, model folder, python) that gives lines; `COMPARISONS` lists them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.evaluate_parity import save_model
from benchmarks.peers.environments import run_script
from pipelines.causal.attribute.logit_parts import direct_logit_attribution
from pipelines.causal.engine.answer_metrics import logit_difference_of
from pipelines.causal.engine.trace import trace
from pipelines.causal.patch.patch_grid import Pair, patch_grid, run_logits
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of
from pipelines.models.load import load_model

TOLERANCE = 1e-4
N_POSITIONS = 14
OUTLIERS = (3, 17, 95)

Line = dict[str, Any]


def save_planted_model(folder: Path) -> Path:
    """A random GPT-2 of the built-in model's shape with biases, a large first position and outlier channels planted."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from pipelines.models.builtin import model_path

    torch.manual_seed(0)
    config = GPT2Config.from_pretrained(model_path(), activation_function="gelu_new", dtype="float32")
    model = GPT2LMHeadModel(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                weight.add_(torch.randn(weight.shape) / 5)
        model.transformer.wpe.weight[0] *= 30 * config.n_embd**0.5 / model.transformer.wpe.weight[0].norm()
        model.transformer.h[0].mlp.c_proj.bias[list(OUTLIERS)] = torch.tensor([400.0, -250.0, 90.0])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


def texts_of(model: nn.Module, n: int, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """n random texts with a start token, each beside one in which one token is another; and the next tokens of both."""
    random = np.random.default_rng(seed)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    clean = random.integers(1, vocabulary, (n, N_POSITIONS))
    clean[:, 0] = 0
    corrupt = clean.copy()
    place = random.integers(1, N_POSITIONS, n)
    corrupt[np.arange(n), place] = random.integers(1, vocabulary, n)
    target, against = random.choice(vocabulary, (2, n), replace=False)
    return {"clean": clean, "corrupt": corrupt, "target": target, "against": against}


def compared(figure: str, ours: NDArray[Any], theirs: NDArray[Any]) -> Line:
    """One line: the largest value and the largest difference, and whether that is small."""
    assert ours.shape == theirs.shape, (figure, ours.shape, theirs.shape)
    scale, difference = float(np.abs(theirs).max()), float(np.abs(ours - theirs).max())
    agrees = difference <= TOLERANCE * scale
    return {"figure": figure, "values": ours.size, "largest": scale, "difference": difference, "agrees": agrees}


def attribution_and_patching(work: Path, folder: Path, python: Path, n_texts: int) -> list[Line]:
    """Shares by part, and patching grids, of both programs."""
    model = load_model(str(folder), "cpu", "fp32").requires_grad_(False)
    texts = texts_of(model, n_texts)
    np.savez(work / "texts.npz", **texts)  # type: ignore[arg-type]
    options = ("--model", folder, "--texts", work / "texts.npz", "--out", work / "found.npz")
    names = run_script(python, "transformer_lens_causal", *options)["names"]
    theirs = np.load(work / "found.npz")
    mine: dict[str, list[NDArray[Any]]] = {}
    for row in zip(*(texts[name] for name in ("clean", "corrupt", "target", "against")), strict=True):
        clean_ids, corrupt_ids = (torch.from_numpy(ids) for ids in row[:2])
        target, against = int(row[2]), int(row[3])
        for name, values in _ours(model, clean_ids, corrupt_ids, target, against, names).items():
            mine.setdefault(name, []).append(values)
    return [compared(name, np.stack(values), theirs[name]) for name, values in mine.items()]


def _ours(
    model: nn.Module, clean_ids: torch.Tensor, corrupt_ids: torch.Tensor, target: int, against: int, names: list[str]
) -> dict[str, NDArray[Any]]:
    """Our figures of one text, by TransformerLens' names and in its shapes."""
    clean, corrupt = trace(model, clean_ids), trace(model, corrupt_ids)
    figure, pair = logit_difference_of(target, against), Pair(clean, corrupt)
    found = {"logits": run_logits(model, clean).numpy()}
    for kind, other in (("difference", against), ("centred", None)):
        shares = direct_logit_attribution(model, clean_ids, target, other)
        own = dict(zip(shares.names, shares.shares.tolist(), strict=True))
        whole = direct_logit_attribution(model, clean_ids, target, other, by_head=False)
        attentions = [pair for pair in zip(whole.names, whole.shares.tolist(), strict=True) if pair[0].startswith("attn.")]
        own |= {f"{name.removeprefix('attn.')}_attn_out": value for name, value in attentions}
        own |= {f"{name.removeprefix('mlp.')}_mlp_out": value for name, value in own.items() if name.startswith("mlp.")}
        own["pos_embed"] = own["position"]
        found[f"attribution_{kind}"] = np.array([own[name] for name in names])
    n_layers, n_heads = len(blocks_of(model)), family_of(model).n_heads(model)
    for site in ("resid_pre", "attn_out", "mlp_out", "head_out"):
        grid = patch_grid(model, pair, site, figure).values.numpy()
        if site == "head_out":
            grid = grid.reshape(n_layers, n_heads, -1)
            found["patching_head_out_all"] = grid[:, :, -1]
            found["patching_head_out"] = grid[:, :, :-1].transpose(0, 2, 1)  # TransformerLens: (layer, position, head)
        else:
            found[f"patching_{site}"] = grid[:, :-1]
    return found


COMPARISONS: dict[str, Callable[[Path, Path, Path, int], list[Line]]] = {
    "attribution and patching": attribution_and_patching,
}


def lines(found: list[dict[str, Any]]) -> list[str]:
    """A table of all comparisons."""
    shown = []
    for own in found:
        shown.append(f"{own['model']}, {own['comparison']}:")
        shown.append(f"  {'figure':<26}{'values':>9}{'largest':>12}{'difference':>13}")
        for row in own["figures"]:
            verdict = "" if row["agrees"] else "  DIFFERS"
            shown.append(
                f"  {row['figure']:<26}{row['values']:>9,}{row['largest']:>12.4f}{row['difference']:>13.1e}{verdict}"
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--transformer-lens-python", type=Path, required=True, metavar="PYTHON", help="of an environment that has it"
    )
    parser.add_argument("--texts", type=int, default=4, help="pairs of texts for each model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    python = options.transformer_lens_python.absolute()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, save in (("built-in model", save_model), ("random model, planted", save_planted_model)):
            folder = save(Path(temporary) / name.split()[0])
            for comparison, compare in COMPARISONS.items():
                work = Path(temporary) / f"{name} {comparison}"
                work.mkdir()
                figures = compare(work, folder, python, options.texts)
                found.append({"model": name, "comparison": comparison, "figures": figures})
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    if not all(row["agrees"] for own in found for row in own["figures"]):
        sys.exit("the two programs differ")


if __name__ == "__main__":
    main()
