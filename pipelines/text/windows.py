"""Windows: what the model sees at once, and which of its positions are kept as rows. Arithmetic on token tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import Store
from actstore.schema import WindowPolicy
from pipelines.text.tokens import TokenTable

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """The windows of one split: window w takes tokens [token_start[w], token_start[w] + n_tokens[w]) of `ids`."""

    ids: NDArray[Any]
    token_start: Ints
    n_tokens: Ints
    policy: WindowPolicy

    @classmethod
    def open(cls, store: Store, segment: int, part: str) -> Windows:
        """The windows of a split of a segment, from the store's tables. Raises DamagedStore."""
        return cls(
            store.table(segment, paths.TOKEN_IDS),
            store.table(segment, paths.window_table(part, paths.TOKEN_START)),
            store.table(segment, paths.window_table(part, paths.N_TOKENS)).astype(np.int64),
            store.manifest.policy,
        )

    def __len__(self) -> int:
        return len(self.token_start)

    def batch(self, windows: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """What the model gets and what is kept: (n, context) token ids and (n, context) kept positions.

        A window shorter than the context is padded at its end with the separator; attention is causal, so padding
        changes nothing before it. Position 0 and separators are not kept unless the policy keeps special positions.
        """
        policy = self.policy
        place = policy.offset(np.arange(policy.context))
        real = (place >= 0) & (place < self.n_tokens[windows, None])
        source = self.token_start[windows, None] + np.where(real, place, 0)
        inputs = np.where(real, self.ids[source].astype(np.int64), policy.separator_token_id)
        if policy.bos:
            inputs[:, 0] = policy.bos_token_id
        if policy.keep_special:
            kept = real.copy()
            kept[:, 0] = True
        else:
            kept = real & (inputs != policy.separator_token_id)
            kept[:, 0] = False
        return inputs, kept

    def token_at(self, window: Ints, position: Ints) -> Ints:
        """(n,) the place in `ids` of each position of a window; a start-of-text position has that of the token after it."""
        return self.policy.token_at(self.token_start[window], position)

    def next_tokens(self, window: Ints, position: Ints) -> Ints:
        """(n,) the token after each position of a window; -1 where there is none in the window."""
        place = self.policy.offset(position) + 1
        has_next = place < self.n_tokens[window]
        source = np.where(has_next, self.token_start[window] + place, 0)
        return np.where(has_next, self.ids[source].astype(np.int64), -1)

    def kept_counts(self) -> Ints:
        """(n_windows,) kept rows of each window."""
        counts = np.zeros(len(self), np.int64)
        for start in range(0, len(self), 4096):
            window = np.arange(start, min(start + 4096, len(self)))
            counts[window] = self.batch(window)[1].sum(axis=1)
        return counts


def cut_windows(table: TokenTable, part: str, policy: WindowPolicy) -> Windows:
    """Cut a split into windows of `policy.stride` tokens: one document after another, or each on its own.

    The last window of the split (packed) or of each document (`document`) may be short.
    """
    bounds = table.part_documents(part) if policy.packing == "document" else np.array(table.part_range(part))
    starts = [np.arange(first, last, policy.stride) for first, last in pairwise(bounds)]
    token_start = np.concatenate([*starts, np.empty(0, np.int64)]).astype(np.int64)
    end = np.concatenate([*(np.full(len(s), b) for s, b in zip(starts, bounds[1:], strict=True)), np.empty(0)]).astype(
        np.int64
    )
    return Windows(table.ids, token_start, np.minimum(policy.stride, end - token_start), policy)
