"""How close the order of a stream is to a uniform shuffle of its store.

    python -m benchmarks.shuffle [--rows 100000 1000000 4000000] [--json]

runs the plan of `actstore.plan` on indices alone and measures two things of every batch of 4,096 rows: how many documents
it holds, and the variance of its mean about the mean of the store, over that of as many rows drawn from the store
independently (1.0 is independent draws; a uniform shuffle, which draws without replacement, is at
1 − (B − 1)/(n − 1)). Exits 1 when the default plan has less than 0.98 of a uniform shuffle's documents or more than 1.1
times the variance of independent draws.

The text: documents of 64 to 8,192 tokens, the logarithm of the length uniform, one after another, cut into windows of 127
kept rows; 16 sources, each a contiguous sixteenth of the text.
The values: row = √0.1 · effect of its source + √0.2 · effect of its document + √0.7 · noise, all independent with mean 0
and variance 1, so two rows of one document correlate by 0.3. No values are drawn: given which rows a batch holds,
the expected variance over all effects and noise follows from counts of rows a document and a source. What is
left to chance is the text and the order; the standard error is over independent repeats of both, an epoch each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actstore.layout import ROUND_BUDGET_BYTES, Layout, choose_layout
from actstore.plan import PartPlan, chunk_sequence, round_order, rounds

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BATCH_ROWS = 4096
WINDOW_ROWS = 127
DOCUMENT_TOKENS = (64, 8192)
N_SOURCES = 16
SOURCE_SHARE, DOCUMENT_SHARE = 0.1, 0.2
"""Shares of a row's variance that all rows of its source, and all rows of its document, have in common."""
RHO = SOURCE_SHARE + DOCUMENT_SHARE
PLACE_BYTES = 4 + 2
"""The window and the position of a row, which lie beside its values."""
WIDTH, WIDE_WIDTH, WIDE_SITES = 768, 4096, 8
"""d_model of a store of one site, and of one with much larger rows."""
LEAST_WIDE_ROWS = 4_000_000
LEAST_ROWS = 50_000
N_RANKS = 4
BUFFER_ROWS = 32_768
"""Rows in the mixing buffer: 50 MB for rows of 768 fp16 values."""
TEXT_CHUNK_ROWS = 1024
ROWS_A_SIZE = 16_000_000
"""Repeats of a size: as many as make about this many rows, from 4 to 64."""
LEAST_DISTINCT_SHARE, MOST_VARIANCE_RATIO = 0.98, 1.1
"""Bounds that the default plan must hold."""
UNIFORM, DEFAULT = "uniform shuffle", "actstore, default"


@dataclass(frozen=True)
class Corpus:
    """`n_rows` rows in text order: the document of each, (n_rows,), and the source of each document, (n_documents,)."""

    document: Ints
    source: Ints

    @classmethod
    def draw(cls, n_rows: int, rng: np.random.Generator) -> Corpus:
        shortest, longest = DOCUMENT_TOKENS
        lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), n_rows // shortest + 1)).astype(np.int64)
        ends = np.cumsum(lengths)
        n_documents = int(np.searchsorted(ends, n_rows)) + 1
        starts = ends[:n_documents] - lengths[:n_documents]
        document = np.repeat(np.arange(n_documents), lengths[:n_documents])[:n_rows]
        return cls(document, starts * N_SOURCES // n_rows)

    @cached_property
    def window_correlation(self) -> float:
        """Mean correlation, about the mean of the store, of two rows of one window."""
        place = np.arange(len(self.document))
        in_window, one_document, one_source = (
            _share_of_pairs(place // WINDOW_ROWS, labels)
            for labels in (0 * place, self.document, self.source[self.document])
        )
        covariance = (SOURCE_SHARE * one_source + DOCUMENT_SHARE * one_document) / in_window
        return (covariance - self.mean_variance) / (1 - self.mean_variance)

    @cached_property
    def document_share(self) -> Floats:
        """(n_documents,): the share of the rows that each has."""
        return np.bincount(self.document) / len(self.document)

    @cached_property
    def source_share(self) -> Floats:
        return np.asarray(np.bincount(self.source, self.document_share, N_SOURCES), np.float64)

    @cached_property
    def mean_variance(self) -> float:
        """Variance of the mean of the store, where that of a row is 1."""
        shared = SOURCE_SHARE * (self.source_share**2).sum() + DOCUMENT_SHARE * (self.document_share**2).sum()
        return float(shared + (1 - RHO) / len(self.document))


def _share_of_pairs(windows: Ints, labels: Ints) -> float:
    """Pairs of neighbouring rows of one window and one label, over all ordered pairs of rows; both labels ascend."""
    edges = np.flatnonzero(np.diff(windows) | np.diff(labels)) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(windows)]]))
    return float((runs * (runs - 1)).sum() / len(windows) ** 2)


@dataclass(frozen=True)
class Plan:
    """A layout, how many chunks a round pools, and over how many ranks the chunks are split."""

    layout: Layout
    chunks_per_round: int
    n_ranks: int = 1

    @classmethod
    def default(cls, n_rows: int, width: int, n_sites: int = 1) -> Plan:
        """The plan of a store of `n_sites` fp16 sites, streamed with the default budget: a chunk of each shard a round."""
        pooled_row_bytes = 4 * width
        layout = choose_layout(n_rows, n_sites * 2 * width + PLACE_BYTES, pooled_row_bytes)
        held = ROUND_BUDGET_BYTES // (layout.chunk_rows * pooled_row_bytes)
        return cls(layout, max(1, min(layout.n_shards, held)))

    @property
    def shard_rows(self) -> Ints:
        """(n_shards,): rows of each shard."""
        return np.array([stop - start for start, stop in map(self.layout.shard_range, range(self.layout.n_shards))])

    def text_rows(self, seed: int) -> Ints:
        """(n_rows,): the place in the text of each row of the store."""
        n_rows = self.layout.n_rows
        kept_counts = np.diff(np.append(np.arange(0, n_rows, WINDOW_ROWS), n_rows))
        part = PartPlan.build(seed, 0, 0, self.layout, kept_counts)
        shift = WINDOW_ROWS * part.window_order - part.row_bounds[:-1]
        rows = np.repeat(shift, kept_counts[part.window_order]) + np.arange(n_rows)
        for shard in range(self.layout.n_shards):
            start, stop = self.layout.shard_range(shard)
            rows[start:stop] = rows[start + part.row_order(shard)]
        return rows

    def order(self, seed: int, epoch: int, rank: int = 0) -> Ints:
        """Rows of the store in the order in which a rank's stream emits them in an epoch."""
        n_chunks = [self.layout.n_chunks(shard) for shard in range(self.layout.n_shards)]
        sequence = chunk_sequence(seed, epoch, n_chunks)
        emitted = []
        for index, chosen in enumerate(rounds(sequence, self.chunks_per_round, rank, self.n_ranks)):
            pooled = [np.arange(*self.layout.chunk_range(shard, chunk)) for shard, chunk in chosen.tolist()]
            emitted.append(np.concatenate(pooled)[round_order(seed, epoch, index, sum(map(len, pooled)), rank)])
        return np.concatenate(emitted)

    def streams(self, seed: int, epoch: int) -> Iterator[tuple[str, Ints]]:
        """The epoch's rows as emitted, with a suffix for the name: one stream, or one rank's and the ranks' together."""
        ranks = [self.order(seed, epoch, rank) for rank in range(self.n_ranks)]
        check_once(np.concatenate(ranks), self.layout.n_rows)
        yield (f"1 of {self.n_ranks} ranks" if self.n_ranks > 1 else ""), ranks[0]
        if self.n_ranks > 1:
            share = BATCH_ROWS // self.n_ranks
            n_steps = min(map(len, ranks)) // share
            steps = [rows[: n_steps * share].reshape(n_steps, share) for rows in ranks]
            yield f"{self.n_ranks} ranks, joint batch", np.concatenate(steps, axis=1).ravel()

    def expected_ratio(self, order: Ints, window_correlation: float) -> float:
        """The variance over independent draws that docs/SHUFFLE.md derives from which shards the batches draw from."""
        n_rows, n_batches = self.layout.n_rows, len(order) // BATCH_ROWS
        shards = order[: n_batches * BATCH_ROWS] // self.layout.shard_rows
        counts = _counts(shards, self.layout.n_shards)
        same_shard = (counts * (counts - 1)).mean(0) / BATCH_ROWS / (BATCH_ROWS - 1)
        same_window = (same_shard * (WINDOW_ROWS - 1) / np.maximum(self.shard_rows - 1, 1)).sum()
        if_uniform = (WINDOW_ROWS - 1) / (n_rows - 1)
        excess = (same_window - if_uniform) / (1 - if_uniform) * (window_correlation + 1 / (n_rows - 1))
        return float(1 + (BATCH_ROWS - 1) * (excess - 1 / (n_rows - 1)))

    @property
    def uncentred_ratio(self) -> float:
        """1 + ρ(B−1)·(c−1)/(Gc−1)·(w−1)/(S−1): about the mean of what the store was drawn from, windows independent."""
        c, pooled_rows = self.layout.chunk_rows, self.chunks_per_round * self.layout.chunk_rows
        same_window = (c - 1) / (pooled_rows - 1) * (WINDOW_ROWS - 1) / (self.layout.shard_rows - 1)
        return 1 + RHO * (BATCH_ROWS - 1) * same_window


def store_plans(n_rows: int) -> dict[str, Plan]:
    """The plans that are compared, by name."""
    default = Plan.default(n_rows, WIDTH)
    plans = {
        DEFAULT: default,
        "actstore, G = N/4": replace(default, chunks_per_round=max(1, default.layout.n_shards // 4)),
        "actstore, ": replace(default, n_ranks=N_RANKS),
    }
    if n_rows >= LEAST_WIDE_ROWS:
        plans[f"actstore, {WIDE_SITES} sites of {WIDE_WIDTH:,}"] = Plan.default(n_rows, WIDE_WIDTH, WIDE_SITES)
    return plans


def half_drain_order(n_rows: int, rng: np.random.Generator) -> Ints:
    """Text rows through a mixing buffer: fill it, shuffle it, give out half, refill it with the rows that follow.

    SAELens' `mixing_buffer` with its default `mix_fraction` of a half, fed with text in order.
    """
    kept = np.empty(0, np.int64)
    emitted, next_row = [], 0
    while next_row < n_rows:
        stop = min(next_row + BUFFER_ROWS - len(kept), n_rows)
        buffer = rng.permutation(np.concatenate([kept, np.arange(next_row, stop)]))
        emitted.append(buffer[: BUFFER_ROWS // 2])
        kept, next_row = buffer[BUFFER_ROWS // 2 :], stop
    return np.concatenate([*emitted, kept])


def random_chunk_order(n_rows: int, rng: np.random.Generator) -> Ints:
    """Text rows by pools of random 1,024-row pieces of the text, as many as the buffer holds, each pool shuffled."""
    starts = rng.permutation(np.arange(0, n_rows, TEXT_CHUNK_ROWS))
    rows = np.concatenate([np.arange(start, min(start + TEXT_CHUNK_ROWS, n_rows)) for start in starts.tolist()])
    return np.concatenate([rng.permutation(rows[first : first + BUFFER_ROWS]) for first in range(0, n_rows, BUFFER_ROWS)])


def _counts(labels: Ints, n_labels: int) -> Ints:
    """(n_batches, n_labels): how often each label is in each batch; `labels` are those of whole batches in a row."""
    n_batches = len(labels) // BATCH_ROWS
    batch = np.repeat(np.arange(n_batches), BATCH_ROWS)
    return np.bincount(batch * n_labels + labels, minlength=n_batches * n_labels).reshape(n_batches, n_labels)


def batch_figures(corpus: Corpus, text_rows: Ints) -> tuple[Floats, Floats]:
    """(n_batches,) each: distinct documents, and the variance of the batch's mean over that of independent draws.

    Whole batches only. With n_d rows of document d among the B of a batch and f_d its share of the store,
    E(mean of batch − mean of store)² = Σ_d 0.2 (n_d/B − f_d)² + Σ_s 0.1 (n_s/B − f_s)² + 0.7 (1/B − 1/n), s the sources.
    """
    n_batches = len(text_rows) // BATCH_ROWS
    counts = _counts(corpus.document[text_rows[: n_batches * BATCH_ROWS]], len(corpus.source))
    source_counts = counts @ (corpus.source[:, None] == np.arange(N_SOURCES))
    variance = (
        DOCUMENT_SHARE * ((counts / BATCH_ROWS - corpus.document_share) ** 2).sum(1)
        + SOURCE_SHARE * ((source_counts / BATCH_ROWS - corpus.source_share) ** 2).sum(1)
        + (1 - RHO) * (1 / BATCH_ROWS - 1 / len(corpus.document))
    )
    return np.count_nonzero(counts, axis=1).astype(np.float64), variance * BATCH_ROWS / (1 - corpus.mean_variance)


def check_once(order: Ints, n_rows: int) -> None:
    """Every row exactly once."""
    times = np.bincount(order, minlength=n_rows)
    if times.min() != 1 or times.max() != 1:
        raise AssertionError(f"an epoch of {n_rows} rows emits rows {times.min()} to {times.max()} times")


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    order: str
    plan: Plan | None
    distinct_documents: float
    distinct_share: float
    variance_ratio: float
    standard_error: float
    worst_batch: float
    expected_ratio: float | None
    uncentred_ratio: float | None


@dataclass
class Measured:
    """One order of one size: a figure for each repeat."""

    plan: Plan | None = None
    distinct: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)

    def add(self, distinct: Floats, ratio: Floats) -> None:
        self.distinct.append(float(distinct.mean()))
        self.ratio.append(float(ratio.mean()))
        self.worst.append(float(ratio.max()))

    def line(self, order: str, uniform_distinct: float) -> Line:
        distinct = float(np.mean(self.distinct))
        return Line(
            order,
            self.plan,
            distinct,
            distinct / uniform_distinct,
            float(np.mean(self.ratio)),
            float(np.std(self.ratio, ddof=1) / np.sqrt(len(self.ratio))),
            max(self.worst),
            float(np.mean(self.expected)) if self.plan else None,
            self.plan.uncentred_ratio if self.plan else None,
        )


def measure(n_rows: int, seed: int) -> list[Line]:
    """Every order of one size, over independent texts and seeds of store and stream; one epoch each."""
    found: dict[str, Measured] = {}
    for repeat in range(int(np.clip(ROWS_A_SIZE // n_rows, 4, 64))):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, n_rows, repeat])))
        corpus = Corpus.draw(n_rows, rng)
        store_seed, stream_seed = rng.integers(2**32, size=2).tolist()
        found.setdefault(UNIFORM, Measured()).add(*batch_figures(corpus, rng.permutation(n_rows)))
        for name, plan in store_plans(n_rows).items():
            text_rows = plan.text_rows(store_seed)
            for suffix, order in plan.streams(stream_seed, epoch=repeat):
                measured = found.setdefault(name + suffix, Measured(plan))
                measured.add(*batch_figures(corpus, text_rows[order]))
                measured.expected.append(plan.expected_ratio(order, corpus.window_correlation))
        for name, order in other_orders(n_rows, rng):
            check_once(order, n_rows)
            found.setdefault(name, Measured()).add(*batch_figures(corpus, order))
    uniform_distinct = float(np.mean(found[UNIFORM].distinct))
    return [measured.line(name, uniform_distinct) for name, measured in found.items()]


def other_orders(n_rows: int, rng: np.random.Generator) -> Iterator[tuple[str, Ints]]:
    """Text rows as other ways emit them, with a name."""
    yield "half-drain buffer", half_drain_order(n_rows, rng)
    yield "random text chunks", random_chunk_order(n_rows, rng)
    yield "sequential", np.arange(n_rows)


def failures(n_rows: int, lines: list[Line]) -> list[str]:
    """What the default plan should hold and does not."""
    default = next(line for line in lines if line.order == DEFAULT)
    found = []
    if default.distinct_share < LEAST_DISTINCT_SHARE:
        found.append(
            f"{n_rows} rows: distinct documents {default.distinct_share:.3f} of uniform, at least {LEAST_DISTINCT_SHARE}"
        )
    if default.variance_ratio > MOST_VARIANCE_RATIO:
        found.append(
            f"{n_rows} rows: variance {default.variance_ratio:.3f} of independent draws, at most {MOST_VARIANCE_RATIO}"
        )
    return found


def print_table(n_rows: int, lines: list[Line]) -> None:
    print(
        f"\n{f'{n_rows:,} rows':<32}{'N':>6}{'S':>9}{'c':>6}{'G':>5}{'documents':>11}{'/uniform':>10}"
        f"{'variance/iid':>18}{'worst':>9}{'expected':>10}{'uncentred':>11}"
    )
    for line in lines:
        shape, predicted = " " * 26, ""
        if line.plan:
            layout = line.plan.layout
            shape = f"{layout.n_shards:>6}{layout.shard_rows:>9}{layout.chunk_rows:>6}{line.plan.chunks_per_round:>5}"
            predicted = f"{line.expected_ratio:>10.3f}{line.uncentred_ratio:>11.3f}"
        print(
            f"{line.order:<32}{shape}{line.distinct_documents:>11.1f}{line.distinct_share:>10.3f}"
            f"{line.variance_ratio:>10.3f} ± {line.standard_error:<5.3f}{line.worst_batch:>9.2f}{predicted}"
        )


def main() -> int:
    """Measure the orders; 1 when the default plan is not close to a uniform shuffle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shuffle", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 1_000_000, 4_000_000], help="sizes of the store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    if min(options.rows) < LEAST_ROWS:
        parser.error(f"--rows {min(options.rows)}: at least {LEAST_ROWS}, since ranks need batches of their own")
    found: dict[int, list[Line]] = {}
    for n_rows in options.rows:
        found[n_rows] = measure(n_rows, options.seed)
        if not options.as_json:
            print_table(n_rows, found[n_rows])
    if options.as_json:
        print(json.dumps({n_rows: [asdict(line) for line in lines] for n_rows, lines in found.items()}, indent=1))
    missed = [failure for n_rows, lines in found.items() for failure in failures(n_rows, lines)]
    print(*missed, sep="\n", end="\n" if missed else "", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
