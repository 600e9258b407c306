"""The value behind the figures of rows: the same however the rows are cut, of codes of any length, exact where it counts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from actstore.errors import InputError
from actstore.reader import ActivationStore
from pipelines.sae.base import Codes, Sae
from pipelines.sae.checkpoint import load_run
from pipelines.sae.reconstruction_metrics import RowMetrics, density_histogram, heldout_metrics, heldout_rows
from pipelines.sae.sparse_operators import Active

D_MODEL, N_FEATURES = 5, 9
SITE = "resid_post.2"


def made(n_rows: int, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows, reconstructions, and the features that fire in each row: any number, none included."""
    generator = np.random.default_rng(seed)
    x = torch.from_numpy(generator.normal(100, 1, size=(n_rows, D_MODEL)))
    fired = [torch.from_numpy(np.flatnonzero(generator.random(N_FEATURES - 1) < 0.3)) for _ in range(n_rows)]
    return x, x + torch.from_numpy(generator.normal(0, 0.3, size=(n_rows, D_MODEL))), fired


def summed(x: Tensor, guess: Tensor, fired: list[Tensor], start: int, stop: int) -> RowMetrics:
    metrics = RowMetrics.empty(D_MODEL, N_FEATURES)
    metrics.update(x[start:stop], guess[start:stop], torch.cat(fired[start:stop]))
    return metrics


def flat(found: dict[str, Any]) -> list[float]:
    histogram = found["density_histogram"]
    return [value for name, value in found.items() if name != "density_histogram"] + histogram["counts"]


@pytest.mark.parametrize("cuts", [(0, 40), (0, 1, 40), (0, 13, 14, 40)])
def test_the_figures_do_not_depend_on_how_the_rows_are_cut(cuts: tuple[int, ...]) -> None:
    rows = made(40)
    whole, parts = summed(*rows, 0, 40), RowMetrics.empty(D_MODEL, N_FEATURES)
    for start, stop in pairwise(cuts):
        parts.merge(summed(*rows, start, stop))
    assert flat(parts.finalize()) == pytest.approx(flat(whole.finalize()), rel=1e-12)
    np.testing.assert_array_equal(parts.firings, whole.firings)


def test_codes_of_any_length_are_counted() -> None:
    x, guess, fired = made(40)
    found = summed(x, guess, fired, 0, 40).finalize()
    counts = np.array([len(own) for own in fired])
    assert counts.min() == 0
    assert counts.max() > 3
    assert found["l0"] == counts.mean()
    assert found["dead_features"] == 1
    assert found["dense_features"] == 8


def test_a_mean_far_larger_than_the_variance_is_no_loss() -> None:
    x, guess, fired = made(1000)
    near = summed(x, guess, fired, 0, 1000).finalize()["fve"]
    far = summed(x + 1e5, guess + 1e5, fired, 0, 1000).finalize()["fve"]
    assert far == pytest.approx(near, rel=1e-6)


def test_a_row_of_zeros_has_no_direction() -> None:
    x, guess, _ = made(3)
    x[1] = 0
    metrics = RowMetrics.empty(D_MODEL, 0)
    metrics.update(x, guess, n_codes=6)
    found = metrics.finalize()
    a, b = x[[0, 2]].numpy(), guess[[0, 2]].numpy()
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    assert found["cosine"] == pytest.approx(((a * b).sum(axis=1) / norms[0] / norms[1]).mean())
    assert found["l2_ratio"] == pytest.approx((norms[1] / norms[0]).mean())
    assert found["l0"] == 2
    assert "dead_features" not in found


@pytest.mark.parametrize("rows", [torch.zeros(0, D_MODEL), torch.full((7, D_MODEL), 0.1), torch.zeros(4, D_MODEL)])
def test_rows_that_do_not_vary_are_refused(rows: Tensor) -> None:
    metrics = RowMetrics.empty(D_MODEL, 0)
    metrics.update(rows, rows, n_codes=0)
    with pytest.raises(InputError, match=f"{len(rows)} rows that do not vary"):
        metrics.finalize()


@pytest.mark.parametrize("n_rows", [1, 7, 10, 99_999, 100_000])
def test_every_feature_is_in_one_bin_or_dead(n_rows: int) -> None:
    firings = np.unique(np.concatenate([[0, 0, 1, n_rows], np.random.default_rng(0).integers(0, n_rows + 1, 50)]))
    found = density_histogram(firings, n_rows)
    assert sum(found["counts"]) + found["dead"] == len(firings)
    assert found["dead"] == 1
    assert len(found["log10_edges"]) == len(found["counts"]) + 1


def test_the_share_that_is_asked_for_is_read_of_every_shard(store: Path) -> None:
    opened = ActivationStore(store)
    n_rows = opened.n_rows("heldout")
    assert sum(map(len, heldout_rows(opened, SITE, 10))) == n_rows
    assert sum(map(len, heldout_rows(opened, SITE, 10, 2 * n_rows))) == n_rows
    assert sum(map(len, heldout_rows(opened, SITE, 10, n_rows // 2))) == pytest.approx(n_rows // 2, abs=3)


class Ragged:
    """Half of an SAE: every other row has no code, the others all that are positive."""

    def __init__(self, sae: Sae):
        self.sae, self.d_model, self.n_features, self.W_dec = sae, sae.d_model, sae.n_features, sae.W_dec

    def codes(self, x: Tensor) -> Codes:
        pre = (x - self.sae.b_dec) @ self.sae.W_enc.T
        pre[::2] = 0
        active = Active.of_mask(pre > 0)
        return Codes(pre[active.rows, active.features], active)

    def reconstruct(self, codes: Codes) -> Tensor:
        return self.sae.reconstruct(codes)


def test_rows_with_any_number_of_codes_are_measured(store: Path, run: Path) -> None:
    sae, opened = load_run(run)[0], ActivationStore(store)
    found = heldout_metrics(cast(Sae, Ragged(sae)), opened, SITE)
    x = torch.from_numpy(np.concatenate([opened.read(shard, f"acts/{SITE}") for shard in opened.shards("heldout")]))
    pre = ((x - sae.b_dec) @ sae.W_enc.T).relu()
    pre[::2] = 0  # one batch holds them all
    error = (x - pre @ sae.W_dec - sae.b_dec).double().square().sum()
    assert found["l0"] == float((pre > 0).sum()) / len(x)
    assert found["fve"] == pytest.approx(1 - float(error / (x - x.mean(dim=0)).double().square().sum()), rel=1e-4)
