"""TransformerLens' own causal tools on given texts: attribution by head, and patching grids, offline, on a local GPT-2.

    saelens/bin/python -m benchmarks.peers.transformer_lens_causal --model FOLDER --texts TEXTS.npz --out FOUND.npz

Run by the Python of an environment that has TransformerLens. TEXTS holds `clean` and `corrupt`, (texts, position) token ids,
and `target` and `against`, (texts,). The model is a HookedTransformer without weight processing: nothing folded, nothing
centred. Attribution is `ActivationCache.decompose_resid` and `stack_head_results` through `apply_ln_to_stack`, times the
final norm's weight, which that leaves out where it is not folded; patching is `transformer_lens.patching`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peers.saelens_collect import let_local_folders_through, quietly

GRIDS = {
    "resid_pre": "get_act_patch_resid_pre",
    "attn_out": "get_act_patch_attn_out",
    "mlp_out": "get_act_patch_mlp_out",
    "head_out": "get_act_patch_attn_head_out_by_pos",
    "head_out_all": "get_act_patch_attn_head_out_all_pos",
}
"""Our site, and TransformerLens' function for it."""


def attribution(model: Any, clean: Any, target: int, against: int) -> dict[str, Any]:
    """Shares of a logit difference, and of one logit above the vocabulary's mean, at the last position."""
    import torch

    _, cache = model.run_with_cache(clean[None])
    heads, head_names = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
    rest, rest_names = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    stack = cache.apply_ln_to_stack(torch.cat([heads, rest]), layer=-1, pos_slice=-1)[:, 0] * model.ln_final.w
    columns = model.W_U[:, target]
    return {
        "names": [*head_names, *rest_names],
        "difference": stack @ (columns - model.W_U[:, against]),
        "centred": stack @ (columns - model.W_U.mean(dim=1)),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write every figure of every text; say which version it was."""
    from importlib.metadata import version

    import numpy as np
    import torch
    import transformer_lens.patching as patching
    from transformer_lens import HookedTransformer

    let_local_folders_through()
    torch.set_grad_enabled(False)
    model = HookedTransformer.from_pretrained_no_processing(str(arguments.model), device="cpu", default_padding_side="right")
    model.set_use_attn_result(True)
    texts = np.load(arguments.texts)
    found: dict[str, list[Any]] = {}
    names: list[str] = []
    for clean, corrupt, target, against in zip(*(texts[n] for n in ("clean", "corrupt", "target", "against")), strict=True):
        clean_ids, corrupt_ids = torch.from_numpy(clean), torch.from_numpy(corrupt)
        shares = attribution(model, clean_ids, int(target), int(against))
        names = shares.pop("names")
        for name, values in shares.items():
            found.setdefault(f"attribution_{name}", []).append(values.numpy())
        _, cache = model.run_with_cache(clean_ids[None])

        def difference(logits: Any, target: int = int(target), against: int = int(against)) -> Any:
            return logits[0, -1, target] - logits[0, -1, against]

        found.setdefault("logits", []).append(model(clean_ids[None])[0, -1].numpy())
        for name, function in GRIDS.items():
            grid = getattr(patching, function)(model, corrupt_ids[None], cache, difference)
            found.setdefault(f"patching_{name}", []).append(grid.numpy())
    np.savez(arguments.out, **{name: np.stack(values) for name, values in found.items()})
    return {"names": names, "transformer_lens": version("transformer-lens")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-2 as a transformers folder, with its tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="clean, corrupt, target and against, as a .npz file")
    parser.add_argument("--out", type=Path, required=True, help="where the figures are written, as a .npz file")
    print(json.dumps(quietly(measure, parser.parse_args())))


if __name__ == "__main__":
    main()
