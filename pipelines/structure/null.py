"""The null of co-firing: tables of codes with the same margins, drawn at random.

A draw keeps how often each feature fires in each block (a document, or a stretch of a long one) and how many features
each row has. Everything else is forgotten: which rows of a block a feature fires in, and so their order, tokens and
positions. It is drawn by curveball trades (Strona et al. 2014, doi:10.1038/ncomms5114; all rows at once: Carstens,
Berger and Strona 2016, arXiv:1609.05137): rows are paired at random inside their block, and each pair deals the features
that only one of them has again, at random, in the same numbers. Such trades reach every table with these margins equally
often. Each trade parts two features of a row, or leaves them together, with probability one half, so that
what is left of the observed table falls as 2^-sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SWEEPS = 10
"""Trades of every row in a draw. After them a thousandth of an observed excess is left in the null's mean."""
CHUNK_PAIRS = 8192
DENSE_COUNT_BYTES = TILE_BYTES = 256 << 20
KEYS_AT_ONCE = 8 << 20
_FEATURE_BITS = np.uint64(24)
_KEY_BITS = 40


@dataclass(frozen=True)
class CodeTable:
    """The features of some rows: `features` (n, width) int32, `n_features` where a row has fewer; `blocks` (n,) rising.

    A row names a feature at most once. Rows of one block lie together, and a draw moves features inside a block only.
    """

    features: NDArray[np.int32]
    blocks: NDArray[np.int64]
    n_features: int

    @property
    def n_rows(self) -> int:
        return len(self.features)

    @property
    def fired(self) -> NDArray[np.bool_]:
        """(n, width) which entries are firings."""
        return self.features < self.n_features

    @cached_property
    def fires(self) -> NDArray[np.int64]:
        """(F,) rows each feature fires in."""
        return np.bincount(self.features.ravel(), minlength=self.n_features + 1)[: self.n_features]

    @cached_property
    def left_places(self) -> NDArray[np.int64]:
        """The rows that trade with the next row, in an order that keeps blocks together."""
        starts = np.flatnonzero(np.r_[True, np.diff(self.blocks) != 0])
        lengths = np.diff(np.r_[starts, self.n_rows])
        within = np.arange(self.n_rows) - np.repeat(starts, lengths)
        return np.flatnonzero((within % 2 == 0) & (within + 1 < np.repeat(lengths, lengths)))

    def block_counts(self, features: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(blocks, len(features)) firings of some features in each block, and (blocks,) rows of each."""
        place = np.full(self.n_features + 1, len(features))
        place[features] = np.arange(len(features))
        _, block = np.unique(self.blocks, return_inverse=True)
        n_blocks = int(block[-1]) + 1 if len(block) else 0
        key = (block[:, None] * (len(features) + 1) + place[self.features]).ravel()
        counts = np.bincount(key, minlength=n_blocks * (len(features) + 1)).reshape(n_blocks, -1)
        return counts[:, :-1].astype(np.float64), np.bincount(block, minlength=n_blocks).astype(np.float64)


def draw(table: CodeTable, key: tuple[int, ...], sweeps: int = SWEEPS) -> CodeTable:
    """One table of the null. The same `key`, such as (seed, half, draw), gives the same table."""
    if table.n_features >= 1 << int(_FEATURE_BITS):
        raise ValueError(f"{table.n_features} features: a draw packs a feature into {_FEATURE_BITS} bits")
    rng = np.random.default_rng(key)
    features = table.features.copy()
    block_bits = table.blocks.astype(np.uint64) << np.uint64(_KEY_BITS)
    for _ in range(sweeps):
        order = np.argsort(block_bits | rng.integers(0, 1 << _KEY_BITS, table.n_rows, np.uint64))
        first, second = order[table.left_places], order[table.left_places + 1]
        for start in range(0, len(first), CHUNK_PAIRS):
            chunk = slice(start, start + CHUNK_PAIRS)
            _trade(features, first[chunk], second[chunk], table.n_features, rng)
    return CodeTable(features, table.blocks, table.n_features)


def _trade(
    features: NDArray[np.int32],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    n_features: int,
    rng: np.random.Generator,
) -> None:
    """Deal the features that only one row of a pair has again, in place.

    Each pair's entries get a key, the `width` smallest go to the first row: what both rows have and what is empty are fixed
    to their side by the smallest and the largest key, the others have random keys in between. So rows keep their numbers.
    """
    width = features.shape[1]
    entries = np.empty((len(first), 2 * width), np.uint32)
    np.left_shift(features[first], 1, out=entries[:, :width], casting="unsafe")
    np.left_shift(features[second], 1, out=entries[:, width:], casting="unsafe")
    entries[:, width:] |= 1  # the low bit is the side, so that of two equal features the first row's comes first
    entries.sort(axis=1)
    feature = entries >> 1
    is_fixed = feature == n_features
    is_same = feature[:, 1:] == feature[:, :-1]
    is_fixed[:, 1:] |= is_same
    is_fixed[:, :-1] |= is_same
    keys = rng.integers(1, (1 << _KEY_BITS) - 1, entries.shape, np.uint64)
    fixed = np.flatnonzero(is_fixed)
    keys.ravel()[fixed] = (entries.ravel()[fixed] & 1).astype(np.uint64) * np.uint64((1 << _KEY_BITS) - 1)
    keys <<= _FEATURE_BITS
    keys |= feature
    keys.sort(axis=1)
    keys &= (np.uint64(1) << _FEATURE_BITS) - np.uint64(1)
    features[first] = keys[:, :width]
    features[second] = keys[:, width:]


@dataclass(frozen=True)
class Pairs:
    """The pairs of features to count: `left` < `right`, (P,), sorted; `features` (L,) those they are made of, rising.

    `left` and `right` are places in `features`.
    """

    features: NDArray[np.int64]
    left: NDArray[np.int32]
    right: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.left)

    @property
    def ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The features of each pair."""
        return self.features[self.left], self.features[self.right]

    def key(self, left: NDArray, right: NDArray) -> NDArray[np.int64]:
        return left.astype(np.int64) * (len(self.features) + 1) + right

    def count(self, table: CodeTable) -> NDArray[np.int64]:
        """(P,) rows in which both features of each pair fire.

        Keys of at most 8M co-firings are made at once. They are counted in a dense array where that takes no more than
        256 MiB, else sorted and looked up.
        """
        wanted = self.key(self.left, self.right)
        total = np.zeros(len(self), np.int64)
        n_dense = (len(self.features) + 1) ** 2
        is_dense = n_dense * 8 <= DENSE_COUNT_BYTES
        dense = np.zeros(n_dense if is_dense else 0, np.int64)
        for keys in self.keys(table):
            if is_dense:
                dense += np.bincount(keys, minlength=n_dense)
            else:
                keys.sort()
                total += np.searchsorted(keys, wanted, side="right") - np.searchsorted(keys, wanted)
        return dense[wanted] if is_dense else total

    def keys(self, table: CodeTable) -> Iterator[NDArray[np.int64]]:
        """The keys of all co-firings, some rows at a time. Features of no pair share one place after the last."""
        place = np.full(table.n_features + 1, len(self.features), np.int32)
        place[self.features] = np.arange(len(self.features))
        a, b = np.triu_indices(table.features.shape[1], 1)
        step = max(1, KEYS_AT_ONCE // max(len(a), 1))
        for start in range(0, table.n_rows, step):
            rows = np.sort(place[table.features[start : start + step]], axis=1)
            yield self.key(rows[:, a].ravel(), rows[:, b].ravel())


def hypergeometric(table: CodeTable, pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, variance), (P,), of the pairs' counts with each feature's rows drawn on their own in each block.

    That is the null without its second promise, the number of features in each row: close to its moments, and known exactly.
    """
    counts, rows = table.block_counts(pairs.features)
    scaled = counts / rows[:, None]
    spread = counts * (rows[:, None] - counts)
    scaled_spread = spread / (rows**2 * np.maximum(rows - 1, 1))[:, None]
    mean, variance = np.zeros(len(pairs)), np.zeros(len(pairs))
    step = max(1, TILE_BYTES // (32 * max(len(rows), 1)))
    for start in range(0, len(pairs), step):
        part = slice(start, start + step)
        left, right = pairs.left[part], pairs.right[part]
        mean[part] = np.einsum("bp,bp->p", counts[:, left], scaled[:, right])
        variance[part] = np.einsum("bp,bp->p", spread[:, left], scaled_spread[:, right])
    return mean, variance


def candidates(table: CodeTable, expectation: float) -> Pairs:
    """The pairs with a hypergeometric expectation of at least `expectation`, found in tiles of features."""
    features = np.flatnonzero(table.fires >= expectation)
    counts, rows = table.block_counts(features)
    scaled = counts / np.maximum(rows, 1)[:, None]
    step = max(1, TILE_BYTES // (8 * max(len(features), 1)))
    lefts, rights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(features), step):
        mean = counts[:, start : start + step].T @ scaled
        left, right = np.nonzero(mean >= expectation)
        is_upper = left + start < right
        lefts.append(left[is_upper] + start)
        rights.append(right[is_upper])
    left, right = np.concatenate(lefts), np.concatenate(rights)
    used = np.unique(np.r_[left, right])
    return Pairs(features[used], *(np.searchsorted(used, side).astype(np.int32) for side in (left, right)))
