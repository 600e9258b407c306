"""What a store of a real model must hold: the model's own rows, each kept token once, and the text it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel

from actstore.reader import ActivationStore
from actstore.schema import PARTS, WindowPolicy
from pipelines.text.tokenizer_files import store_tokenizer


def stored_rows(store: ActivationStore, part: str, name: str) -> dict[int, NDArray[Any]]:
    """Rows of an array by segment, in the order of the shards."""
    return {
        segment.index: np.concatenate(
            [store.read(shard, name) for shard in store.shards(part) if shard.segment == segment.index]
        )
        for segment in store.segments
        if segment.parts[part].n_rows
    }


def all_windows(store: ActivationStore, segment: int, part: str) -> NDArray[np.int64]:
    """(n_windows, context) what the model sees, rebuilt from the store's own tables."""
    policy = store.manifest.policy
    ids = store.table(segment, "tokens/ids").astype(np.int64)
    starts, counts = (store.table(segment, f"{part}/windows/{name}") for name in ("token_start", "n_tokens"))
    rows = []
    for start, n_tokens in zip(starts, counts.astype(int), strict=True):
        real = [policy.bos_token_id] * policy.bos + ids[start : start + n_tokens].tolist()
        rows.append(real + [policy.separator_token_id] * (policy.context - len(real)))
    return np.array(rows)


def kept_pairs(windows: NDArray[np.int64], n_tokens: NDArray[Any], policy: WindowPolicy) -> list[tuple[int, int]]:
    """Every (window, position) that the policy keeps."""
    return [
        (window, position)
        for window, n in enumerate(n_tokens.astype(int) + policy.bos)
        for position in range(n)
        if policy.keep_special or (position and windows[window, position] != policy.separator_token_id)
    ]


def assert_rows_are_the_models(path: Path, reference: GPT2LMHeadModel, ulp: float = 0.0) -> None:
    """Compare every row of a store with transformers' hidden states, to 1e-5 of the largest and `ulp` of the value."""
    store = ActivationStore(path)
    for part in PARTS:
        windows, positions = (stored_rows(store, part, f"rows/{name}") for name in ("window", "position"))
        for segment, window in windows.items():
            inputs = torch.from_numpy(all_windows(store, segment, part))
            with torch.inference_mode():
                hidden = reference(inputs, output_hidden_states=True).hidden_states
            for site in store.sites:
                layer = int(site.removeprefix("resid_post."))
                rows = torch.from_numpy(stored_rows(store, part, f"acts/{site}")[segment])
                if layer == len(hidden) - 2:  # transformers' last hidden state is behind the final LayerNorm
                    with torch.inference_mode():
                        rows = reference.transformer.ln_f(rows)
                expected = hidden[layer + 1].numpy()[window, positions[segment]]
                allowed = 1e-5 * np.abs(expected).max() + ulp * np.exp2(np.floor(np.log2(np.abs(expected))))
                assert (np.abs(rows.numpy() - expected) <= allowed).all()


def assert_each_kept_token_is_one_row(path: Path) -> None:
    store = ActivationStore(path)
    for part in PARTS:
        windows, positions = (stored_rows(store, part, f"rows/{name}") for name in ("window", "position"))
        for segment, window in windows.items():
            pairs = sorted(zip(window.tolist(), positions[segment].tolist(), strict=True))
            n_tokens = store.table(segment, f"{part}/windows/n_tokens")
            assert pairs == kept_pairs(all_windows(store, segment, part), n_tokens, store.manifest.policy)


def documents_in(path: Path) -> dict[str, bytes]:
    """The text of every document, its pieces in different segments put together; each is of one split alone."""
    store = ActivationStore(path)
    pieces = store_tokenizer(store).token_bytes()
    texts: dict[str, bytes] = {}
    splits: dict[str, int] = {}
    for segment in store.segments:
        ids, offsets = store.table(segment.index, "tokens/ids"), store.table(segment.index, "documents/offsets")
        for document, name in enumerate(store.document_names(segment.index)):
            own = ids[offsets[document] : offsets[document + 1] - 1]
            texts[name] = texts.get(name, b"") + b"".join(pieces[i] for i in own)
            split = int(store.table(segment.index, "documents/heldout")[document])
            assert splits.setdefault(name, split) == split
    return texts
