"""Rows of known features are what their description says, a store of them reads like any other, and recovery is measured
as its definitions say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from actstore.errors import InputError
from actstore.integrity import find_faults
from actstore.reader import ActivationStore
from actstore.recode import recode_store
from pipelines.sae.checkpoint import load_run
from pipelines.stores.made.made_store import SITE
from pipelines.stores.made.recovery import (
    absorbed_share,
    cosine_matrix,
    dead_features,
    match,
    mean_max_cosine,
    measure,
    recall,
    split_features,
)
from pipelines.stores.made.synthetic import BLOCK_ROWS, MOST_OFTEN, Superposition, truth_of, write_synthetic_store
from pipelines.train.stage import TrainConfig, train

FLAT = Superposition(d_model=24, n_features=40, k=4)
TREE = Superposition(d_model=24, n_features=40, k=4, kind="hierarchy", group_size=4, within=0.4)
TOGETHER = replace(TREE, kind="groups", k=2)
N_ROWS = 40 * BLOCK_ROWS


# The generator


@pytest.mark.parametrize("truth", [FLAT, TREE, TOGETHER], ids=lambda truth: truth.kind)
def test_features_fire_as_often_as_they_should(truth: Superposition) -> None:
    """Within five standard errors of the binomial law; rates follow Zipf's law over groups up to where they are cut off."""
    found = (truth.codes(0, N_ROWS) > 0).mean(axis=0).A1
    error = np.sqrt(truth.frequencies * (1 - truth.frequencies) / N_ROWS)
    assert (np.abs(found - truth.frequencies) < 5 * error + 1e-12).all()
    assert truth.frequencies.sum() == pytest.approx(truth.k)
    first = truth.frequencies[:: truth.group_size] / (1 if truth.kind != "groups" else truth.within)
    assert first.max() <= MOST_OFTEN
    law = (first * np.arange(1, len(first) + 1))[first < MOST_OFTEN]
    assert len(law) > 5
    assert law == pytest.approx(law[0])


def test_a_child_fires_only_where_its_parent_does_and_then_as_often_as_asked() -> None:
    fires = TREE.codes(0, N_ROWS).toarray() > 0
    assert (TREE.parents == np.where(np.arange(40) % 4, np.arange(40) // 4 * 4, -1)).all()
    for child in np.flatnonzero(TREE.parents >= 0):
        with_parent = fires[fires[:, TREE.parents[child]], child]
        assert not (fires[:, child] & ~fires[:, TREE.parents[child]]).any()
        assert abs(with_parent.mean() - TREE.within) < 5 * np.sqrt(0.25 / len(with_parent))


def test_features_of_a_group_fire_together_and_no_others_do() -> None:
    fires = TOGETHER.codes(0, N_ROWS).toarray() > 0
    correlation = np.corrcoef(fires.T)
    group = np.arange(40) // TOGETHER.group_size
    same = (group[:, None] == group) & ~np.eye(40, dtype=bool)
    assert correlation[same].min() > 0.15
    assert np.abs(correlation[group[:, None] != group]).max() < 5 / np.sqrt(N_ROWS)
    assert (TOGETHER.parents == -1).all()


@pytest.mark.parametrize("law", ["lognormal", "folded_normal"])
def test_magnitudes_are_positive_with_mean_square_one_and_of_their_law(law: str) -> None:
    magnitudes = replace(FLAT, magnitudes=law).codes(0, N_ROWS).data.astype(np.float64)
    assert magnitudes.min() > 0
    assert np.square(magnitudes).mean() == pytest.approx(1, abs=0.02)
    median = {"lognormal": np.exp(-0.25), "folded_normal": 0.67449}[law]
    assert np.median(magnitudes) == pytest.approx(median, abs=0.01)


def test_a_row_is_its_codes_times_the_directions_plus_noise_of_the_size_asked() -> None:
    codes, rows = FLAT.codes(0, N_ROWS).toarray(), FLAT.rows(0, N_ROWS)
    rest = rows - codes @ FLAT.directions
    assert rest.std(axis=0) == pytest.approx(np.full(24, FLAT.noise), rel=0.05)
    assert np.abs(rest.mean(axis=0)).max() < 5 * FLAT.noise / np.sqrt(N_ROWS)
    assert np.abs(np.corrcoef(rest.T) - np.eye(24)).max() < 5 / np.sqrt(N_ROWS)
    exact = replace(FLAT, noise=0.0)
    assert np.allclose(exact.rows(0, 100), exact.codes(0, 100).toarray() @ FLAT.directions, atol=1e-6)


@given(start=st.integers(0, 5000), length=st.integers(1, 3000), truth=st.sampled_from([FLAT, TREE]))
@settings(max_examples=20, deadline=None)
def test_any_range_of_rows_is_the_same_whoever_computes_it(start: int, length: int, truth: Superposition) -> None:
    stop, middle = start + length, start + length // 2 + 1
    whole = truth.rows(start, stop)
    assert np.array_equal(whole[: middle - start], truth.rows(start, middle))
    assert np.array_equal(whole[-1:], replace(truth).rows(stop - 1, stop))


def test_another_seed_gives_other_directions_and_other_codes() -> None:
    other = replace(FLAT, seed=1)
    assert np.abs(np.sum(other.directions * FLAT.directions, axis=1)).max() < 0.9
    assert (other.codes(0, 1000) != FLAT.codes(0, 1000)).nnz > 1000


def test_directions_are_unit_vectors_as_orthogonal_as_their_number_allows() -> None:
    for n_features, least in ((24, 0.0), (40, np.sqrt((40 - 24) / (24 * 39)))):  # the Welch bound
        plain = Superposition(d_model=24, n_features=n_features, k=2)
        spread = {}
        for near_orthogonal in (False, True):
            directions = replace(plain, near_orthogonal=near_orthogonal).directions
            assert np.linalg.norm(directions, axis=1) == pytest.approx(1, abs=1e-6)
            between = (directions @ directions.T)[~np.eye(n_features, dtype=bool)]
            spread[near_orthogonal] = np.sqrt(np.square(between).mean())
        assert spread[True] == pytest.approx(least, abs=2e-3)
        assert spread[False] == pytest.approx(1 / np.sqrt(24), rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tree"}, "kind 'tree'"),
        ({"magnitudes": "one"}, "magnitudes 'one'"),
        ({"n_features": 41, "kind": "groups", "group_size": 4}, "41 features in groups of 4"),
        ({"group_size": 4}, "groups of 1"),
        ({"kind": "hierarchy"}, "groups of 1"),
        ({"within": 0.0}, "within 0.0"),
        ({"noise": -1.0}, "noise -1.0"),
        ({"k": 11}, "at most 10 at a time"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_description_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(FLAT, **change)


# The store


def all_rows(store: ActivationStore, part: str) -> NDArray[np.float32]:
    return np.concatenate([store.read(shard, f"acts/{SITE}") for shard in store.shards(part)])


def test_a_store_holds_the_rows_the_description_and_the_directions(tmp_path: Path) -> None:
    store = ActivationStore(write_synthetic_store(tmp_path / "store", TREE, 5000, 700))
    assert np.array_equal(all_rows(store, "train"), TREE.rows(0, 5000))
    assert np.array_equal(all_rows(store, "heldout"), TREE.rows(5000, 5700))
    assert truth_of(store) == TREE
    assert np.array_equal(store.table(0, "truth/directions"), TREE.directions)
    assert not find_faults(store.place)
    found = store.statistics(SITE)
    assert found.mean == pytest.approx(TREE.rows(0, 5000).mean(axis=0), abs=1e-5)
    assert {store.locate(row, part).document_name for part in ("train", "heldout") for row in (0, 699)} == {
        "train",
        "heldout",
    }
    tokens = np.concatenate([store.token_index(shard) for part in ("train", "heldout") for shard in store.shards(part)])
    assert sorted(tokens) == [*range(5000), *range(5001, 5701)], "each row stands at a token of its own"
    recode_store(tmp_path / "store", tmp_path / "copy", "int8")
    assert truth_of(ActivationStore(tmp_path / "copy")) == TREE


def test_a_store_is_continued_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_synthetic_store(tmp_path / "whole", FLAT, 5000, 700)
    calls = itertools.count()
    rows = Superposition.rows

    def killed(self: Superposition, start: int, stop: int) -> NDArray[np.float32]:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return rows(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Superposition, "rows", killed)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic_store(tmp_path / "parts", FLAT, 5000, 700)
    write_synthetic_store(tmp_path / "parts", FLAT, 5000, 700)
    ours, theirs = (
        {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()} for at in (whole, tmp_path / "parts")
    )
    assert ours == theirs


def test_a_store_of_something_else_has_no_known_features(store: Path) -> None:
    with pytest.raises(InputError, match="nobody knows"):
        truth_of(ActivationStore(store))


# Recovery


def random_case(seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(int(rng.integers(3, 7)), 5)), rng.normal(size=(int(rng.integers(3, 7)), 5))


@pytest.mark.parametrize("seed", range(10))
def test_cosines_mmcs_and_recall_equal_their_plain_definitions(seed: int) -> None:
    decoder, truth = random_case(seed)
    found = cosine_matrix(decoder, truth)
    largest = []
    for j, true in enumerate(truth):
        cosines = [d @ true / (np.sqrt(d @ d) * np.sqrt(true @ true)) for d in decoder]
        assert found[:, j] == pytest.approx(cosines)
        largest.append(max(cosines))
    assert mean_max_cosine(found) == pytest.approx(sum(largest) / len(largest))
    assert recall(found, 0.5) == sum(cosine >= 0.5 for cosine in largest) / len(largest)


@pytest.mark.parametrize("seed", range(10))
def test_the_matching_is_the_best_of_all_assignments(seed: int) -> None:
    cosines = cosine_matrix(*random_case(seed))
    n_latents, n_true = cosines.shape
    if n_latents >= n_true:
        best = max(
            sum(cosines[i, j] for j, i in enumerate(pick)) for pick in itertools.permutations(range(n_latents), n_true)
        )
    else:
        best = max(
            sum(cosines[i, j] for i, j in enumerate(pick)) for pick in itertools.permutations(range(n_true), n_latents)
        )
    latent, cosine = match(cosines)
    used = latent[latent >= 0]
    assert len(set(used)) == len(used) == min(cosines.shape)
    assert cosine.sum() == pytest.approx(best)
    assert all(cosine[j] == (cosines[i, j] if i >= 0 else 0) for j, i in enumerate(latent))


@pytest.mark.parametrize("seed", range(10))
def test_dead_and_split_features_equal_their_plain_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.random((20, 6)) * (rng.random((20, 6)) < 0.05)
    assert list(dead_features(csr_matrix(codes))) == [not any(row[f] > 0 for row in codes) for f in range(6)]
    cosines = rng.uniform(0.3, 1, size=(9, 4))
    shares: dict[int, list[int]] = {}
    for f in range(9):
        j = max(range(4), key=lambda true: cosines[f, true])
        if cosines[f, j] >= 0.7:
            shares.setdefault(j, []).append(f)
    assert list(split_features(cosines)) == [len(shares.get(j, [])) >= 2 for j in range(4)]


@pytest.mark.parametrize("seed", range(10))
def test_absorption_equals_its_plain_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder, truth, parents, latent = (
        rng.normal(size=(6, 3)),
        rng.normal(size=(4, 3)),
        np.array([-1, 0, 0, -1]),
        rng.permutation(6)[:4],
    )
    codes = rng.random((40, 6)) * (rng.random((40, 6)) < 0.5)
    true_codes = rng.random((40, 4)) * (rng.random((40, 4)) < 0.5)
    true_codes[true_codes[:, 0] == 0, 1:3] = 0
    found = absorbed_share(decoder, csr_matrix(codes), truth, csr_matrix(true_codes), parents, latent)
    for child in range(4):
        hits = rows = 0
        for code, true in zip(codes, true_codes, strict=True):
            if parents[child] < 0 or true[child] == 0:
                continue
            parent, main, own = truth[parents[child]], latent[parents[child]], latent[child]
            along = decoder[own] @ parent / np.linalg.norm(parent)
            is_near = along / np.linalg.norm(decoder[own]) >= 0.1
            work = code[own] * along >= 0.4 * true[parents[child]] * np.linalg.norm(parent)
            rows, hits = rows + 1, hits + (code[main] == 0 and code[own] > 0 and is_near and work)
        assert found[child] == pytest.approx(hits / rows if rows else 0)


PLAIN = replace(TREE, noise=0.0, magnitudes="folded_normal")


def exact_codes() -> csr_matrix:
    return PLAIN.codes(0, 4000)


def test_the_true_dictionary_in_any_order_and_scale_is_perfect() -> None:
    order, scale = np.random.default_rng(0).permutation(40), np.linspace(0.5, 3, 40)
    decoder = PLAIN.directions[order] * scale[:, None]
    codes = csr_matrix(exact_codes()[:, order].multiply(1 / scale))
    found = measure(decoder, codes, PLAIN.directions, exact_codes(), PLAIN.parents)
    assert (found.mmcs, found.matched_cosine) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert (found.recall, found.n_dead, found.n_split, found.n_absorbed) == (1.0, 0, 0, 0)
    assert found.l0 == exact_codes().nnz / 4000


def test_a_split_feature_is_counted_once_and_costs_no_recall() -> None:
    """Feature 3 is learned twice, each half firing where it is strong or weak; a third copy never fires."""
    codes = exact_codes().toarray()
    strong = np.where(codes[:, 3] > 0.7, codes[:, 3], 0)
    weak = codes[:, 3] - strong
    codes = np.column_stack([codes[:, :3], strong, codes[:, 4:], weak, 0 * weak])
    decoder = np.vstack([PLAIN.directions, PLAIN.directions[3], PLAIN.directions[3]])
    found = measure(decoder, csr_matrix(codes), PLAIN.directions, exact_codes(), PLAIN.parents)
    assert (found.recall, found.n_dead, found.n_split, found.n_absorbed) == (1.0, 1, 1, 0)
    dead_only = np.delete(codes, 40, axis=1)
    found = measure(np.delete(decoder, 40, axis=0), csr_matrix(dead_only), PLAIN.directions, exact_codes(), PLAIN.parents)
    assert (found.n_dead, found.n_split) == (1, 0), "a dead copy splits nothing"


def test_an_absorbed_child_is_counted_and_lowers_the_matched_cosine() -> None:
    """The dictionary feature of child 5 holds its parent 4 too, which then stays silent."""
    codes, decoder = exact_codes().toarray(), PLAIN.directions.copy()
    is_child = codes[:, 5] > 0
    codes[is_child, 5] = codes[is_child, 4] = codes[is_child, 4:6].mean(axis=1)
    sae = codes.copy()
    sae[is_child, 4] = 0
    decoder[5] = decoder[4] + decoder[5]
    assert np.allclose(sae @ decoder, codes @ PLAIN.directions, atol=1e-5), "reconstruction is as good, with a lower L0"
    found = measure(decoder, csr_matrix(sae), PLAIN.directions, csr_matrix(codes), PLAIN.parents)
    assert (found.n_dead, found.n_split, found.n_absorbed) == (0, 0, 1)
    assert found.recall == 39 / 40
    assert found.matched_cosine < 1 - 0.2 / 40
    assert found.l0 < exact_codes().nnz / 4000


def test_a_dictionary_that_is_too_small_matches_what_it_has() -> None:
    found = measure(PLAIN.directions[:20], exact_codes()[:, :20], PLAIN.directions, exact_codes(), PLAIN.parents)
    assert (found.recall, found.n_absorbed) == (0.5, 0)
    assert found.matched_cosine == pytest.approx(0.5, abs=1e-6)
    assert found.mmcs > 0.6


# The whole


def test_training_recovers_a_small_independent_problem(tmp_path: Path) -> None:
    """64 features in 32 dimensions, three at a time; twice as many learn them, since as many would stay in local minima."""
    truth = Superposition(d_model=32, n_features=64, k=3, zipf=0.5)
    write_synthetic_store(tmp_path / "store", truth, 60_000, 2000)
    train(TrainConfig(tmp_path / "store", tmp_path / "run", features=128, k=3, tokens=480_000, batch=512, lr=5e-3))
    sae, _ = load_run(tmp_path / "run")
    found = match(cosine_matrix(sae.W_dec.numpy(), truth.directions))[1]
    assert found.mean() >= 0.95
