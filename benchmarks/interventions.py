"""Interventions a second: many features ablated in batches from the patched block on, beside one at a time.

    python -m benchmarks.interventions [--shape small] [--repeats 5] [--json]

Each intervention sets one feature of an SAE to zero at one position and gives the last position's logits. One at a time is
what a textbook does: a hook in the whole model, a forward pass for each. Both are measured in turns in one run, a batch of
the same interventions each, and the median of the ratios is given; largest difference of their logits beside it. Weights
are random: speed does not depend on them. Text of 12 and of 128 tokens; the SAE's site is the middle layer's `resid_post`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from pipelines.causal.engine.trace import Trace, trace
from pipelines.causal.patch.patch_grid import dense_codes, feature_cells, run_logits
from pipelines.models.capture import hooked
from pipelines.models.sites.site import Site
from pipelines.sae.architectures.topk import TopKSae

SHAPES = {"builtin": (6, 192, 6, 4096), "small": (12, 768, 12, 50257)}
"""Layers, width, heads, vocabulary: the built-in model's and GPT-2 small's."""
AT_LEAST = {12: 5.0, 128: 3.0}
"""The least ratio, by tokens of the text."""
ONE_BY_ONE = 6
"""Interventions timed in the whole model in one turn."""


def random_model(shape: str) -> nn.Module:
    """A GPT-2 of a shape, with PyTorch's GELU as `load_model` sets it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, width, n_head, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer,
        n_embd=width,
        n_head=n_head,
        vocab_size=vocabulary,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@torch.no_grad()
def one_at_a_time(model: nn.Module, run: Trace, site: Site, sae: TopKSae, change: Tensor, cells: Tensor) -> Tensor:
    """(n, vocabulary) last logits, a forward pass of the whole model for each (position, feature)."""
    found = []
    for position, feature in cells.tolist():

        def edit(x: Tensor, position: int = position, feature: int = feature) -> Tensor:
            changed = x.clone()
            changed[0, position] += change[position, feature] * sae.W_dec[feature]
            return changed

        with hooked(model, site, edit):
            found.append(model(input_ids=run.ids[None], use_cache=False).logits[0, -1])
    return torch.stack(found)


def measure(model: nn.Module, n_tokens: int, n_batched: int, repeats: int) -> dict[str, Any]:
    """Both ways in turns, `repeats` times."""
    width = model.config.hidden_size  # type: ignore[union-attr]
    site = Site("resid_post", model.config.num_hidden_layers // 2 - 1)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(n_tokens)
    run = trace(model, torch.randint(0, 4096, (n_tokens,), generator=generator))
    sae = TopKSae(width, 4096, 32).requires_grad_(False)  # type: ignore[arg-type]
    change = -dense_codes(sae, run.at(site), torch.arange(n_tokens) > 0)
    cells = change.nonzero()
    cells = cells[torch.randperm(len(cells), generator=generator)[:n_batched]]
    watched, clean = 7, run_logits(model, run)  # the token whose logit is compared

    def figure(logits: Tensor) -> Tensor:
        return logits[..., watched].double()

    feature, position = cells[:, 1], cells[:, 0]
    feature_cells(model, run, site, sae, change, feature[:8], position[:8], figure)  # the first call loads parts of torch
    ratios, rates, apart = [], [], []
    for turn in range(repeats):
        own = cells[turn * ONE_BY_ONE % len(cells) :][:ONE_BY_ONE]
        started = time.perf_counter()
        expected = one_at_a_time(model, run, site, sae, change, own)
        single = len(own) / (time.perf_counter() - started)
        started = time.perf_counter()
        found = feature_cells(model, run, site, sae, change, feature, position, figure)
        batched = len(cells) / (time.perf_counter() - started)
        apart.append(float((expected[:, watched] - found[turn * ONE_BY_ONE % len(cells) :][:ONE_BY_ONE]).abs().max()))
        ratios.append(batched / single)
        rates.append((single, batched))
    return {
        "tokens": n_tokens,
        "site": site.label,
        "interventions": len(cells),
        "one_at_a_time_per_s": statistics.median(single for single, _ in rates),
        "batched_per_s": statistics.median(batched for _, batched in rates),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "at_least": AT_LEAST[n_tokens],
        "largest_effect": float((found - float(clean[watched])).abs().max()),
        "largest_difference": max(apart),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="whose shape the model has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = random_model(options.shape)
    found = [measure(model, n_tokens, n, options.repeats) for n_tokens, n in ((12, 256), (128, 64))]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"{options.shape}, features ablated one position at a time, interventions/s, {torch.get_num_threads()} threads"
        )
        print(
            f"{'tokens':>6}{'one at a time':>15}{'batched':>10}{'ratio':>8}{'lowest':>8}{'at least':>10}{'difference':>12}"
        )
        for row in found:
            print(
                f"{row['tokens']:>6}{row['one_at_a_time_per_s']:>15.1f}{row['batched_per_s']:>10.1f}{row['ratio']:>8.1f}"
                f"{row['lowest_ratio']:>8.1f}{row['at_least']:>10.0f}{row['largest_effect']:>10.1e}{row['largest_difference']:>12.1e}"
            )
    if any(row["ratio"] < row["at_least"] for row in found):
        sys.exit("slower than it has to be")


if __name__ == "__main__":
    main()
