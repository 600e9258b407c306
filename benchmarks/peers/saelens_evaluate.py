"""SAELens' own evaluation of an SAE on given windows of tokens: `run_evals`, offline, on a local GPT-2.

    saelens/bin/python -m benchmarks.peers.saelens_evaluate --model FOLDER --sae FOLDER --tokens TOKENS.npy [--keep-special]

Run by the Python of an environment that has SAELens. The SAE is a folder in SAELens' format, TOKENS.npy holds (windows,
context) token ids, first token included. The model is TransformerLens' HookedTransformer without weight processing.
All windows are one batch, since SAELens averages some figures over batches. `run_evals` takes its tokens from an
`ActivationsStore`; here a stand-in gives it these windows. With `--keep-special` no token is excluded
(`exclude_special_tokens=False`); without, those of the tokenizer are, as SAELens does by itself.

Printed are its figures, and the means of `get_recons_loss` over the positions that have a next token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peers.saelens_collect import let_local_folders_through, quietly


class GivenWindows:
    """What `run_evals` asks of an activations store."""

    def __init__(self, tokens: Any):
        self.tokens = tokens
        self.store_batch_size_prompts, self.context_size = tokens.shape

    def get_batch_tokens(self, batch_size: int) -> Any:
        assert batch_size == len(self.tokens)
        return self.tokens

    def reset_input_dataset(self) -> None:
        pass


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """SAELens' figures by group, and those of the positions that have a next token."""
    import numpy as np
    import sae_lens
    import torch
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, get_recons_loss, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer

    let_local_folders_through()
    model = HookedTransformer.from_pretrained_no_processing(str(arguments.model), device="cpu", default_padding_side="right")
    sae = SAE.load_from_disk(str(arguments.sae), device="cpu")
    tokens = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    figures, by_feature = run_evals(
        sae,
        GivenWindows(tokens),
        model,
        ActivationScaler(),
        get_eval_everything_config(
            batch_size_prompts=len(tokens), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
        ),
        exclude_special_tokens=not arguments.keep_special,
    )
    one_by_one = get_recons_loss(sae, model, ActivationScaler(), tokens, compute_kl=True, compute_ce_loss=True)
    n_targets = tokens.shape[1] - 1
    density = torch.tensor(by_feature["feature_density"])
    return {
        **{name: value for group in figures.values() for name, value in group.items()},
        "next_token": {name: float(value[:, :n_targets].double().mean()) for name, value in one_by_one.items()},
        "dead_features": int((density == 0).sum()),
        "dense_features": int((density > 0.1).sum()),
        "architecture": sae.cfg.architecture(),
        "hook_name": sae.cfg.metadata.hook_name,
        "sae_lens": sae_lens.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GPT-2 as a transformers folder, with its tokenizer")
    parser.add_argument("--sae", type=Path, required=True, help="an SAE as SAELens keeps it")
    parser.add_argument("--tokens", type=Path, required=True, help="(windows, context) token ids, as a .npy file")
    parser.add_argument("--keep-special", action="store_true", help="exclude no token")
    arguments = parser.parse_args()
    print(json.dumps(quietly(measure, arguments)))


if __name__ == "__main__":
    main()
