"""The toy model keeps as many features as it has dimensions when they are dense, and more the sparser they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.errors import InputError, OutputExists
from pipelines.compare.superposition import (
    SuperpositionConfig,
    Toy,
    decoder_cosines,
    superposition,
    superposition_lines,
    train_toy,
)
from pipelines.metrics.directions import random_directions
from pipelines.sae.checkpoint import load_run

SMALL = SuperpositionConfig(out=Path("nowhere"), sparsities=3, steps=1500, batch=256)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return train_toy(SMALL)


def test_dense_features_get_a_dimension_each_and_sparse_ones_share(toy: Toy) -> None:
    """20 features in 5 dimensions at 1 - S = 1, 0.1, 0.01."""
    np.testing.assert_allclose(toy.densities, [1, 0.1, 0.01])
    dense, middle, sparse = toy.kept.tolist()
    assert dense == 5
    assert dense < middle < sparse
    assert middle >= 10
    assert sparse >= 16


def test_the_most_important_features_are_kept_first(toy: Toy) -> None:
    assert np.flatnonzero(toy.norms[0] > 0.5).tolist() == [0, 1, 2, 3, 4]


def test_kept_features_interfere_only_in_superposition(toy: Toy) -> None:
    assert toy.interference[0] < 0.3
    assert toy.interference[2] > 1.5
    assert (np.diff(toy.interference) > 0).all()


def test_sparser_features_cost_less(toy: Toy) -> None:
    assert toy.loss[2] < toy.loss[1] < toy.loss[0]


def test_figures_of_a_toy_are_those_of_its_matrices() -> None:
    """Two features on one axis, opposite; a third on its own; a fourth not kept."""
    w = np.array([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.1, 0.0]]])
    own = Toy(np.ones(1), w, np.zeros((1, 4)), np.zeros(1))
    assert own.kept.tolist() == [3]
    assert own.interference[0] == pytest.approx(((1 + 0.01) + (1 + 0.01) + 0) / 3)
    np.testing.assert_allclose(own.gram[0], w[0] @ w[0].T)


def test_a_seed_gives_the_same_toy() -> None:
    short = SuperpositionConfig(out=Path("nowhere"), sparsities=2, steps=20)
    np.testing.assert_array_equal(train_toy(short).w, train_toy(short).w)


def test_random_directions_have_the_cosines_that_the_sphere_gives() -> None:
    """Mean square 1 / d; a decoder that is random looks like chance, an orthogonal one has none, pairs have all."""
    random = decoder_cosines(random_directions(400, 50, 3), 0)
    assert random["random"]["mean_square"] == pytest.approx(1 / 50, rel=0.03)
    assert random["decoder"]["mean_square"] == pytest.approx(1 / 50, rel=0.03)
    assert random["decoder"]["mean_nearest"] == pytest.approx(random["random"]["mean_nearest"], abs=0.01)
    assert sum(random["decoder"]["pairs"]) == 400 * 399 // 2
    orthogonal = decoder_cosines(np.eye(50), 0)["decoder"]
    assert (orthogonal["mean_square"], orthogonal["largest"]) == (pytest.approx(0, abs=1e-9), 0)
    doubled = decoder_cosines(np.concatenate([np.eye(50), 2 * np.eye(50)]), 0)["decoder"]
    assert doubled["mean_nearest"] == pytest.approx(1)


def test_the_trained_runs_cosines_are_those_of_its_decoder(run: Path) -> None:
    decoder = load_run(run)[0].W_dec.numpy().astype(np.float64)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    table = np.abs(decoder @ decoder.T)
    np.fill_diagonal(table, 0)
    found = decoder_cosines(decoder, 0)["decoder"]
    assert found["mean_square"] == pytest.approx(np.square(table).sum() / (64 * 63), rel=1e-4)
    assert found["mean_nearest"] == pytest.approx(table.max(axis=1).mean(), rel=1e-4)


def test_plots_and_figures_are_published(run: Path, tmp_path: Path) -> None:
    config = SuperpositionConfig(out=tmp_path / "out", run=run, sparsities=2, steps=20)
    found: dict[str, Any] = superposition(config)
    assert found["plots"] == ["cosines.png", "kept.png", "toy.png"]
    for name in found["plots"]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "out" / "superposition.json").read_text())
    assert kept["toy"] == found["toy"]
    assert "nearest" in "\n".join(superposition_lines(found))
    with pytest.raises(OutputExists):
        superposition(config)


def test_a_toy_that_cannot_be_is_named() -> None:
    with pytest.raises(InputError, match="features 3, dimensions 5"):
        SuperpositionConfig(out=Path("x"), features=3)
    with pytest.raises(InputError, match="sparsities 1"):
        SuperpositionConfig(out=Path("x"), sparsities=1)
