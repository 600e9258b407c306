"""Attribution patching beside exact ablation, over the features active in held-out text; and what the final norm is for.

    python -m benchmarks.attribution_patching RUN [--store STORE] [--prompts 24] [--tokens 16] [--json]

For each prompt, the first tokens of a held-out window: every active feature is set to zero wherever it fires in it (by
feature), and each firing alone (by firing), exactly and by one backward pass; Spearman's correlation of the two lists. The
metrics are the logit difference of the two tokens that the model finds most likely, the log-probability of the first, and
KL, whose gradient is zero here: it is taken by integrated gradients. The exit status says whether the mean over prompts, by
feature, of the logit difference is 0.9 or more.

Then direct logit attribution of the same prompts with the final LayerNorm and without, as teaching code has it: the rank
correlation of the parts' shares, and how many of them have another sign.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from actstore.reader import ActivationStore
from pipelines.causal.attribute.logit_parts import attribute_logit, only_layers, stream_parts
from pipelines.causal.engine.answer_metrics import change_metric
from pipelines.causal.engine.language_model import Spliced, open_spliced, open_store
from pipelines.causal.engine.trace import Trace, trace
from pipelines.causal.patch.gradient_estimates import feature_effects, gradients, integrated_gradients
from pipelines.causal.patch.patch_grid import dense_codes, feature_cells, run_logits
from pipelines.causal.patch.rank_agreement import rank_correlation
from pipelines.metrics.model_loss import heldout_windows, window_batches

AT_LEAST = 0.9
STEPS = 16
CASES = {"logit_difference": 0, "log_probability": 0, "kl": STEPS, "logit_difference, integrated": STEPS}
"""Metric, and steps of integrated gradients; 0 for one gradient."""


def prompts_of(store: ActivationStore, n: int, n_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, kept) of the first tokens of n held-out windows, spread over the split."""
    found = []
    for windows, chosen in window_batches(heldout_windows(store), n, 1):
        inputs, kept = windows.batch(chosen)
        found.append((torch.from_numpy(inputs[0, :n_tokens].astype(np.int64)), torch.from_numpy(kept[0, :n_tokens])))
    return found


def correlations(spliced: Spliced, run: Trace, kept: Tensor) -> dict[str, dict[str, float | None]]:
    """By case, by feature and by firing: the rank correlation of estimates with exact ablations."""
    model, sae, site = spliced.lm.model, spliced.sae, spliced.site
    change = -dense_codes(sae, run.at(site), kept)
    logits = run_logits(model, run)
    target, against = logits.topk(2).indices.tolist()
    position, feature = change.nonzero().T
    active = change.any(dim=0).nonzero()[:, 0]
    end = run.at(site) + change @ sae.W_dec.detach()
    found: dict[str, dict[str, float | None]] = {}
    for case, steps in CASES.items():
        figure = change_metric(case.partition(",")[0], logits, target, against).of
        if steps:
            slope = integrated_gradients(model, run, site, end, figure, steps)
        else:
            slope = gradients(model, run, [site], figure)[site.label]
        estimates = feature_effects(change, sae, slope).double()
        firings = feature_cells(model, run, site, sae, change, feature, position, figure)
        whole = feature_cells(model, run, site, sae, change, active, torch.full_like(active, len(run)), figure)
        found[case] = {
            "by feature": rank_correlation(estimates.sum(dim=0)[active], whole),
            "by firing": rank_correlation(estimates[position, feature], firings),
        }
    return found


def without_the_final_norm(spliced: Spliced, run: Trace) -> dict[str, float | None]:
    """Shares of attentions' heads and MLPs in the likeliest token's logit, with the final norm and without."""
    model = spliced.lm.model
    parts = only_layers(stream_parts(model, run))
    target = int(run_logits(model, run).argmax())
    right = attribute_logit(model, run, parts, target, centred=False).shares[:-1]
    naive = attribute_logit(model, run, parts, target, centred=False, final_norm=False).shares
    centred = attribute_logit(model, run, parts, target).shares[:-1]
    return {
        "rank correlation": rank_correlation(right, naive),
        "other sign": float((right.sign() != naive.sign()).double().mean()),
        "rank correlation, centred": rank_correlation(centred, naive),
        "other sign, centred": float((centred.sign() != naive.sign()).double().mean()),
        "same largest": float(right.argmax() == naive.argmax()),
        "size of naive over right": float(naive.abs().sum() / right.abs().sum()),
    }


def measure(spliced: Spliced, prompts: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Both measurements, over all prompts."""
    agreed: dict[str, dict[str, list[float]]] = {}
    naive: dict[str, list[float]] = {}
    for ids, kept in prompts:
        run = trace(spliced.lm.model, ids)
        for case, kinds in correlations(spliced, run, kept).items():
            for kind, value in kinds.items():
                assert value is not None
                agreed.setdefault(case, {}).setdefault(kind, []).append(value)
        for name, value in without_the_final_norm(spliced, run).items():
            assert value is not None
            naive.setdefault(name, []).append(value)
    worst = int(np.argmin(agreed["logit_difference"]["by feature"]))
    return {
        "site": spliced.site.label,
        "prompts": len(prompts),
        "tokens": len(prompts[0][0]),
        "agreement": [
            {"metric": case, "of": kind, "mean": statistics.mean(values), "lowest": min(values)}
            for case, kinds in agreed.items()
            for kind, values in kinds.items()
        ],
        "worst_prompt": spliced.lm.codec.text(prompts[worst][0].tolist()),
        "worst": agreed["logit_difference"]["by feature"][worst],
        "without_final_norm": {name: statistics.mean(values) for name, values in naive.items()},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Two tables and the worst prompt."""
    shown = [
        f"{found['site']}, {found['prompts']} prompts of {found['tokens']} tokens; rank correlation with exact ablation:"
    ]
    shown.append(f"  {'metric':<32}{'of':<14}{'mean':>8}{'lowest':>9}")
    shown += [f"  {r['metric']:<32}{r['of']:<14}{r['mean']:>8.3f}{r['lowest']:>9.3f}" for r in found["agreement"]]
    shown.append(f"worst prompt (logit difference, by feature, {found['worst']:.3f}): {found['worst_prompt']!r}")
    shown.append("direct logit attribution without the final LayerNorm, beside with it, mean over the prompts:")
    return shown + [f"  {name:<28}{value:>8.3f}" for name, value in found["without_final_norm"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of the demo, or any other")
    parser.add_argument("--store", help="where its store is, if it was moved")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16, help="of each prompt, start token included")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spliced = open_spliced(options.run, options.store, device="cpu")
    store = open_store(options.run, spliced.record, options.store)
    found = measure(spliced, prompts_of(store, options.prompts, options.tokens))
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    (mean,) = (row["mean"] for row in found["agreement"] if (row["metric"], row["of"]) == ("logit_difference", "by feature"))
    if mean < AT_LEAST:
        sys.exit(f"the mean is {mean:.3f}, it has to be {AT_LEAST} or more")


if __name__ == "__main__":
    main()
