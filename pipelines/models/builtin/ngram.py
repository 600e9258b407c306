"""Interpolated modified Kneser–Ney models over token ids: unigram, bigram, trigram, any order.

The highest order discounts raw counts. Every lower order discounts the number of distinct tokens seen to the left (Chen and
Goodman 1998, section 3, with three discounts per order estimated from counts of counts). The unigram falls back to the
uniform distribution: every token has a probability above zero in every context, and each context's probabilities sum to 1.

An n-gram is one int64 key, its tokens as digits in base `n_vocab`. Counting sorts the keys, a lookup is a binary search, and
a whole corpus is scored at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
MAX_KEY_BITS = 62


@dataclass(frozen=True)
class Level:
    """One order of the model: discounted probabilities of its n-grams, and the mass left for the order below.

    `keys` (n_ngrams,) and `contexts` (n_contexts,) are sorted. `direct` (n_ngrams,) is the discounted count divided by the
    context's total. `left_over` (n_contexts,) is the share of the total that the discounts took away.
    """

    keys: np.ndarray
    direct: np.ndarray
    contexts: np.ndarray
    left_over: np.ndarray


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Discounts of n-grams with count 1, 2 and 3 or more, from the counts of counts.

    Chen and Goodman's closed form. A corpus can be too small for this form (no n-gram has a count of 1, 2, 3 or 4, or a
    discount lies outside 0 to its count); then the discounts are 0.5, 1 and 1.5.
    """
    n = [int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4)]
    if min(n) == 0:
        return FALLBACK_DISCOUNTS
    y = n[0] / (n[0] + 2 * n[1])
    discounts = (1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2])
    if any(not 0 < discount <= count for count, discount in enumerate(discounts, start=1)):
        return FALLBACK_DISCOUNTS
    return discounts


def build_level(keys: np.ndarray, counts: np.ndarray, n_vocab: int) -> Level:
    """The level of sorted distinct n-gram `keys` with their `counts`, both (n_ngrams,)."""
    discount = np.array((0.0, *estimate_discounts(counts)))[np.minimum(counts, 3)]
    contexts, first = np.unique(keys // n_vocab, return_index=True)
    totals = np.add.reduceat(counts, first)
    n_ngrams_of_context = np.diff(np.append(first, len(keys)))
    direct = (counts - discount) / np.repeat(totals, n_ngrams_of_context)
    return Level(keys, direct, contexts, np.add.reduceat(discount, first) / totals)


def find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The position of each of `wanted` in `sorted_values`, and whether the value is present."""
    position = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return position, sorted_values[position] == wanted


class KneserNey:
    """An interpolated modified Kneser–Ney model of a given order.

    `documents` are token ids, int64 (n_tokens,). The first token of each (start of text) is given, never predicted, and is
    repeated where an n-gram reaches beyond the document's start.
    """

    def __init__(self, documents: Sequence[np.ndarray], order: int, n_vocab: int) -> None:
        if order < 1 or order * np.log2(n_vocab) > MAX_KEY_BITS:
            raise ValueError(
                f"order {order} with {n_vocab} tokens does not fit a key of {MAX_KEY_BITS} bits; "
                f"choose an order from 1 to {int(MAX_KEY_BITS // np.log2(n_vocab))}"
            )
        if not any(len(ids) > 1 for ids in documents):
            raise ValueError(f"{len(documents)} documents, none of 2 tokens or more to count; give at least one")
        self.order = order
        self.n_vocab = n_vocab
        keys, counts = np.unique(np.concatenate([self.ngram_keys(ids) for ids in documents]), return_counts=True)
        levels = [build_level(keys, counts, n_vocab)]
        for below in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % n_vocab**below, return_counts=True)
            levels.append(build_level(keys, counts, n_vocab))
        self.levels = levels[::-1]

    def ngram_keys(self, ids: np.ndarray) -> np.ndarray:
        """The key of the n-gram that ends at each token after the first, int64 (n_tokens − 1,)."""
        padded = np.concatenate([np.repeat(ids[:1], self.order - 1), ids[1:]])
        keys = np.zeros(max(0, len(ids) - 1), dtype=np.int64)
        for position in range(self.order):
            keys = keys * self.n_vocab + padded[position : position + len(keys)]
        return keys

    def key_probabilities(self, keys: np.ndarray) -> np.ndarray:
        """Probability of each n-gram's last token given the others, float64, in the keys' shape."""
        p = np.full(keys.shape, 1 / self.n_vocab)
        for n_tokens, level in enumerate(self.levels, start=1):
            suffix = keys % self.n_vocab**n_tokens
            at, seen = find(level.contexts, suffix // self.n_vocab)
            p = np.where(seen, p * level.left_over[at], p)
            at, seen = find(level.keys, suffix)
            p = p + np.where(seen, level.direct[at], 0.0)
        return p

    def prob(self, context: Sequence[int]) -> np.ndarray:
        """The distribution of the next token after `context`, float64 (n_vocab,), with sum 1.

        `context` holds one token or more. Only the last `order - 1` count; a shorter context is read as the beginning of a
        document.
        """
        if len(context) == 0:
            raise ValueError("the context has 0 tokens; give 1 or more, such as the begin-of-text token")
        padded = [*[context[0]] * self.order, *context][len(context) + 1 :]
        key = 0
        for token in padded:
            key = key * self.n_vocab + int(token)
        return self.key_probabilities(key * self.n_vocab + np.arange(self.n_vocab, dtype=np.int64))

    def document_bits(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Bits of each document without its first token, which is given; float64 (n_documents,)."""
        return np.array([-np.log2(self.key_probabilities(self.ngram_keys(ids))).sum() for ids in documents])
