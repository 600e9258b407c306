"""Logits of TransformerLens with features of an SAE ablated, for given prompts.

    saelens/bin/python -m benchmarks.peers.transformerlens_ablate --model FOLDER --sae FILE --k K --hook NAME --prompts FILE
        --out FILE

Run by the Python of an environment that has TransformerLens. PROMPTS is JSON: a list of {"ids", "kept", "features"}. The
model is HookedTransformer without weight processing (no folding, no centring). The SAE is a safetensors file of a TopK SAE
(W_enc, W_dec (F, d), b_enc, b_dec), encoded here by its definition, densely. OUT gets, for each prompt, the logits
(features, vocabulary) at the last position with each feature set to 0: `keep_i`, added to the activation as a change, and
`drop_i`, in the reconstruction; at kept positions only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peers.saelens_collect import let_local_folders_through, quietly


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every prompt with every feature, one at a time."""
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file, save_file
    from transformer_lens import HookedTransformer

    let_local_folders_through()
    model = HookedTransformer.from_pretrained_no_processing(str(arguments.model), device="cpu", default_padding_side="right")
    sae = load_file(arguments.sae)
    found = {}
    for number, prompt in enumerate(json.loads(arguments.prompts.read_text())):
        ids, kept = torch.tensor(prompt["ids"])[None], torch.tensor(prompt["kept"])[:, None]
        logits: dict[str, list[Any]] = {"keep": [], "drop": []}
        for feature in prompt["features"]:
            for how, rows in logits.items():

                def edit(x: Any, hook: Any, feature: int = feature, how: str = how, kept: Any = kept) -> Any:
                    pre = (x[0] - sae["b_dec"]) @ sae["W_enc"].T + sae["b_enc"]
                    top = torch.topk(pre, arguments.k, dim=1)
                    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
                    without = codes.clone()
                    without[:, feature] = 0
                    reconstruction, change = without @ sae["W_dec"] + sae["b_dec"], (without - codes) @ sae["W_dec"]
                    return torch.where(kept, reconstruction if how == "drop" else x[0] + change, x[0])[None]

                with torch.no_grad():
                    rows.append(model.run_with_hooks(ids, fwd_hooks=[(arguments.hook, edit)])[0, -1])
        found |= {f"{how}_{number}": torch.stack(rows) for how, rows in logits.items()}
    save_file(found, arguments.out)
    return {"transformer_lens": version("transformer-lens")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-2 as a transformers folder, with its tokenizer")
    parser.add_argument("--sae", type=Path, required=True, help="weights of a TopK SAE")
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--hook", required=True, help="such as blocks.3.hook_resid_post")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    print(json.dumps(quietly(measure, parser.parse_args())))


if __name__ == "__main__":
    main()
