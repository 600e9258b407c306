"""Every figure of `evaluate` against its definition, and the refusals: held-out text only, the same model only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from modelkit import D_MODEL, build_model
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2LMHeadModel

from actstore.errors import DamagedStore, IdentityMismatch, IncompleteStore, InputError, NotAStore
from actstore.reader import ActivationStore
from actstore.recode import recode_store
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.evaluate.stage import (
    EvaluateConfig,
    cosine_summary,
    evaluate,
    evaluation_lines,
    linear_fve,
    nearest_cosines,
    pca_basis,
    read_evaluation,
)
from pipelines.metrics.model_loss import Replace, heldout_text, heldout_windows, reconstructing, window_batches
from pipelines.models.load import load_model
from pipelines.models.sites.site import Site
from pipelines.sae.checkpoint import load_run, save_run
from pipelines.sae.reconstruction_metrics import heldout_metrics
from pipelines.text.windows import Windows

SITE = "resid_post.2"
ALL = 10_000


@pytest.fixture(scope="module")
def own_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, to be written beside."""
    return Path(shutil.copytree(run, tmp_path_factory.mktemp("own") / "run"))


@pytest.fixture(scope="module")
def figures(store: Path, own_run: Path) -> dict[str, Any]:
    return evaluate(EvaluateConfig(run=own_run, store=store, windows=ALL, device="cpu"))


@pytest.fixture(scope="module")
def opened(store: Path) -> ActivationStore:
    return ActivationStore(store)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> torch.nn.Module:
    return load_model(str(model_folder), "cpu", "fp32")


def rows_of(store: ActivationStore, part: str) -> NDArray[np.float64]:
    return np.concatenate([store.read(shard, f"acts/{SITE}") for shard in store.shards(part)]).astype(np.float64)


# Rows


def test_the_figures_of_rows_follow_their_definitions(opened: ActivationStore, run: Path, figures: dict[str, Any]) -> None:
    x = rows_of(opened, "heldout")
    reconstruction, values, indices = load_run(run)[0](torch.from_numpy(x.astype(np.float32)))
    guess, codes = reconstruction.numpy().astype(np.float64), values.numpy()
    error = np.square(x - guess).sum(axis=1).mean()
    norms, guess_norms = np.linalg.norm(x, axis=1), np.linalg.norm(guess, axis=1)
    density = np.bincount(indices.numpy()[codes > 0], minlength=64) / len(x)
    expected = {
        "heldout_rows": len(x),
        "fve": 1 - error / (np.square(x).sum(axis=1).mean() - np.square(x.mean(axis=0)).sum()),
        "mse": error / D_MODEL,
        "l0": (codes > 0).sum(axis=1).mean(),
        "cosine": ((x * guess).sum(axis=1) / norms / guess_norms).mean(),
        "l2_ratio": (guess_norms / norms).mean(),
        "relative_reconstruction_bias": np.square(guess_norms).mean() / (x * guess).sum(axis=1).mean(),
        "dead_features": (density == 0).sum(),
        "dead_share": (density == 0).mean(),
        "dense_features": (density > 0.1).sum(),
        "dense_share": (density > 0.1).mean(),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    histogram = figures["density_histogram"]
    inside, _ = np.histogram(np.log10(density[density > 0]), histogram["log10_edges"])
    assert histogram["counts"] == inside.tolist()
    assert sum(histogram["counts"]) + histogram["dead"] == 64


def test_the_pca_is_that_of_the_singular_values(opened: ActivationStore, figures: dict[str, Any]) -> None:
    train, x = rows_of(opened, "train"), rows_of(opened, "heldout")
    mean = train.mean(axis=0)
    axes = np.linalg.svd(train - mean, full_matrices=False)[2][:16]
    guess = mean + (x - mean) @ axes.T @ axes
    expected = 1 - np.square(x - guess).sum() / np.square(x - x.mean(axis=0)).sum()
    assert figures["pca_fve"] == pytest.approx(expected, rel=1e-6)
    assert figures["unexplained_over_pca"] == pytest.approx((1 - figures["fve"]) / (1 - expected), rel=1e-5)


def test_all_components_but_one_leave_the_smallest_variance(opened: ActivationStore) -> None:
    basis, mean = pca_basis(opened, SITE, D_MODEL)
    np.testing.assert_allclose(basis.T @ basis, np.eye(D_MODEL), atol=1e-9)
    found = linear_fve(opened, SITE, basis, mean)
    assert found[-1] == pytest.approx(1, abs=1e-9)
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(linear_fve(opened, SITE, basis[:, :5], mean), found[:5])


def test_the_silent_features_are_those_the_training_counted(run: Path, figures: dict[str, Any]) -> None:
    metrics = load_run(run)[1].metrics
    assert figures["silent_features"] == metrics["dead_features"]
    assert figures["silent_share"] == metrics["dead_features"] / 64


# The decoder


@pytest.mark.parametrize("block", [1, 37 * 10, 1 << 25])
def test_the_nearest_directions_are_those_of_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluate.stage.BLOCK_COSINES", block)
    directions = np.random.default_rng(0).normal(size=(37, 6)) * np.arange(1, 38)[:, None]
    directions[9] = 0
    norms = np.linalg.norm(directions, axis=1)
    cosines = directions @ directions.T / np.maximum(np.outer(norms, norms), 1e-12)
    np.fill_diagonal(cosines, -np.inf)
    found = nearest_cosines(torch.from_numpy(directions))
    np.testing.assert_allclose(found.numpy(), cosines.max(axis=1), atol=1e-12)


def test_the_summary_of_the_cosines_is_that_of_their_distribution(run: Path, figures: dict[str, Any]) -> None:
    unit = load_run(run)[0].W_dec.double().numpy()
    nearest = np.sort(unit @ unit.T, axis=1)[:, -2]
    found = figures["decoder_cosine"]
    assert found["mean"] == pytest.approx(nearest.mean(), rel=1e-5)
    assert (found["median"], found["q95"]) == pytest.approx(np.quantile(nearest, [0.5, 0.95]), rel=1e-5)
    assert (found["max"], found["share_above_0.9"]) == pytest.approx((nearest.max(), (nearest > 0.9).mean()), rel=1e-5)


def test_a_single_direction_has_no_neighbour() -> None:
    assert cosine_summary(nearest_cosines(torch.ones(1, 3))) == {}


# Text


def text_figures(store: ActivationStore, model: torch.nn.Module, replace: Replace) -> dict[str, Any]:
    return heldout_text(model, store, Site.parse(SITE), {"sae": replace}, ALL, "cpu").finalize()


def plain_windows(store: ActivationStore) -> list[tuple[Tensor, Tensor]]:
    """(ids (1, n), kept (1, n)) of each held-out window, unpadded, straight from the tables."""
    ids, start, n_tokens = (
        store.table(0, name).astype(np.int64)
        for name in ("tokens/ids", "heldout/windows/token_start", "heldout/windows/n_tokens")
    )
    policy = store.manifest.policy
    found = []
    for first, n in zip(start.tolist(), n_tokens.tolist(), strict=True):
        window = torch.tensor([[policy.bos_token_id, *ids[first : first + n]]])
        kept = window != policy.separator_token_id
        kept[0, 0] = False
        found.append((window, kept))
    return found


def plain_loss(store: ActivationStore, model_folder: Path, row: Tensor | None) -> float:
    """Transformers' own loss over the held-out windows, one by one, the kept rows of block 2 replaced by `row`."""
    model = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    total = n_targets = 0.0
    for ids, kept in plain_windows(store):

        def edit(_module: object, _inputs: object, output: Any, kept: Tensor = kept) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if row is not None:
                hidden[kept] = row
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.transformer.h[2].register_forward_hook(edit)
        with torch.inference_mode():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        handle.remove()
        n_targets += ids.shape[1] - 1
    return total / n_targets


def test_replacing_the_activation_by_itself_changes_nothing_at_all(
    opened: ActivationStore, model: torch.nn.Module, figures: dict[str, Any]
) -> None:
    found = text_figures(opened, model, lambda rows: rows)
    assert (found["delta_ce"], found["kl"]) == (0, 0)
    assert (found["ce_loss_score"], found["ce_loss_score_mean"], found["kl_score"]) == (1, 1, 1)
    assert found["ce_clean"] == figures["ce_clean"]


def test_the_losses_are_those_of_transformers_with_a_hook_of_our_own(
    opened: ActivationStore, model_folder: Path, figures: dict[str, Any]
) -> None:
    mean = torch.from_numpy(rows_of(opened, "train").mean(axis=0)).float()
    for name, row in {"ce_clean": None, "ce_zero": torch.zeros(D_MODEL), "ce_mean": mean}.items():
        assert figures[name] == pytest.approx(plain_loss(opened, model_folder, row), rel=1e-5), name
    windows = plain_windows(opened)
    assert figures["text_tokens"] == sum(ids.shape[1] - 1 for ids, _ in windows)
    assert figures["text_positions"] == sum(ids.shape[1] for ids, _ in windows)
    assert figures["text_positions_replaced"] == sum(int(kept.sum()) for _, kept in windows) == figures["heldout_rows"]
    assert figures["positions"] == "all but the first of a window and separators"


def test_the_scores_follow_their_definitions(figures: dict[str, Any]) -> None:
    clean, sae, zero, mean = (figures[f"ce_{name}"] for name in ("clean", "sae", "zero", "mean"))
    assert figures["delta_ce"] == sae - clean
    assert figures["ce_loss_score"] == (zero - sae) / (zero - clean)
    assert figures["ce_loss_score_mean"] == (mean - sae) / (mean - clean)
    assert figures["kl_score"] == (figures["kl_zero"] - figures["kl"]) / figures["kl_zero"]


def test_the_divergence_is_never_negative_and_that_of_the_definition(
    opened: ActivationStore, model: torch.nn.Module, model_folder: Path
) -> None:
    mean = torch.from_numpy(rows_of(opened, "train").mean(axis=0)).float()
    rows = {"kl": torch.full((D_MODEL,), 0.5), "kl_zero": torch.zeros(D_MODEL), "kl_mean": mean}
    found = text_figures(opened, model, lambda x: rows["kl"].expand_as(x))
    for name, row in rows.items():
        expected = n_targets = 0.0
        for ids, kept in plain_windows(opened):
            with torch.inference_mode():
                clean = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                hidden = torch.where(kept[..., None], row, _block_output(model, ids))
                changed = model.lm_head(model.transformer.ln_f(hidden))[0, :-1].double().log_softmax(-1)
            expected += float((clean.exp() * (clean - changed)).sum())
            n_targets += len(clean)
        assert found[name] == pytest.approx(expected / n_targets, rel=1e-4, abs=1e-7), name
        assert found[name] > 0


def _block_output(model: torch.nn.Module, ids: Tensor) -> Tensor:
    hidden = []
    handle = model.transformer.h[2].register_forward_hook(  # type: ignore[union-attr, index]
        lambda _m, _i, output: hidden.append(output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=ids)
    handle.remove()
    return hidden[0]


def test_only_heldout_rows_and_windows_are_read(
    opened: ActivationStore, store: Path, run: Path, model: torch.nn.Module, figures: dict[str, Any], tmp_path: Path
) -> None:
    """With every training activation gone from the disk, the figures are the same."""
    bare = Path(shutil.copytree(store, tmp_path / "store"))
    shutil.rmtree(bare / "data.zarr/segments/0000/train/acts" / SITE / "c")
    sae, _ = load_run(run)
    rows = heldout_metrics(sae, ActivationStore(bare), SITE)
    text = text_figures(ActivationStore(bare), model, reconstructing(sae))
    assert rows | text == {name: figures[name] for name in rows | text}
    heldout = opened.table(0, "documents/heldout")
    offsets = opened.table(0, "documents/offsets")
    for windows in heldout_windows(opened):
        document = np.searchsorted(offsets, windows.token_start, side="right") - 1
        assert heldout[document].all()


def test_a_number_of_windows_is_that_over_all_segments() -> None:
    segments = [cast(Windows, range(n)) for n in (50, 0, 30, 1)]
    for asked, expected in [(1, 1), (7, 7), (40, 40), (81, 81), (1000, 81)]:
        batches = window_batches(segments, asked, 16)
        assert sum(len(chosen) for _, chosen in batches) == expected
        assert all(0 < len(chosen) <= 16 and chosen.max() < len(windows) for windows, chosen in batches)
        chosen = [(segments.index(windows), int(w)) for windows, own in batches for w in own]
        assert chosen == sorted(set(chosen))


# What is kept


def test_the_file_beside_the_run_holds_what_was_printed(
    store: Path, own_run: Path, opened: ActivationStore, figures: dict[str, Any]
) -> None:
    path = Path(figures["saved"])
    assert path == own_run / "evaluations" / f"{opened.snapshot}-windows{ALL}-pca16" / "evaluation.json"
    assert {**read_evaluation(path.parent), "saved": str(path)} == figures
    run_id = load_run(own_run)[1].run_id
    assert [figures[name] for name in ("run_id", "store_id", "snapshot")] == [run_id, opened.store_id, opened.snapshot]
    assert not list(own_run.rglob(".*"))


def test_every_figure_that_is_printed_is_that_of_the_evaluation(figures: dict[str, Any]) -> None:
    text = "\n".join(evaluation_lines(figures))
    names = ("fve", "pca_fve", "cosine", "l2_ratio", "ce_clean", "ce_sae", "ce_mean", "ce_zero", "kl", "kl_zero")
    for name in (*names, "kl_mean", "delta_ce", "ce_loss_score", "ce_loss_score_mean", "kl_score"):
        assert f"{figures[name]:.4f}" in text, name
    assert figures["positions"] in text


def test_an_evaluation_of_another_store_or_options_replaces_none(
    store: Path, own_run: Path, figures: dict[str, Any], tmp_path: Path
) -> None:
    first = Path(figures["saved"]).read_bytes()
    recode_store(store, tmp_path / "int8", "int8")
    asked = EvaluateConfig(run=own_run, store=store, windows=4, device="cpu")
    others = (asked, replace(asked, store=tmp_path / "int8"), replace(asked, windows=2), replace(asked, pca=3))
    places = {figures["saved"]}
    for other in others:
        found = evaluate(other)
        kept = read_evaluation(Path(found["saved"]).parent)
        assert {**kept, "saved": found["saved"]} == found
        assert (kept["store_id"], kept["windows"]) == (ActivationStore(other.store).store_id, other.windows)
        assert kept["pca_components"] == other.pca
        places.add(found["saved"])
    assert len(places) == 1 + len(others)
    assert Path(figures["saved"]).read_bytes() == first


def test_the_evaluation_of_a_grown_store_is_kept_beside_the_earlier_one(
    model_folder: Path, texts: Path, run: Path, tmp_path: Path
) -> None:
    asked = CollectConfig(out=tmp_path / "store", model=str(model_folder), corpus=str(texts), layer=(2,), context=32)
    own = Path(shutil.copytree(run, tmp_path / "run"))
    places = []
    for tokens in (1500, 2500):
        collect(replace(asked, tokens=tokens))
        places.append(evaluate(EvaluateConfig(run=own, store=tmp_path / "store", windows=2, device="cpu"))["saved"])
    assert len({read_evaluation(Path(place).parent)["snapshot"] for place in places}) == 2


def test_an_evaluation_made_again_replaces_its_own(store: Path, own_run: Path) -> None:
    asked = EvaluateConfig(run=own_run, store=store, windows=2, device="cpu")
    first = evaluate(asked)
    before = Path(first["saved"]).read_bytes()
    assert evaluate(asked) == first
    assert Path(first["saved"]).read_bytes() == before


def test_a_failed_evaluation_leaves_the_earlier_one(
    store: Path, own_run: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluate.stage.load_same_model", None)
    with pytest.raises(TypeError):
        evaluate(EvaluateConfig(run=own_run, store=store, windows=ALL, device="cpu"))
    assert {**read_evaluation(Path(figures["saved"]).parent), "saved": figures["saved"]} == figures


def test_what_is_no_evaluation_is_refused(own_run: Path, tmp_path: Path, figures: dict[str, Any]) -> None:
    with pytest.raises(
        NotAStore, match=r"holds a run, not an evaluation \(no evaluation.json\); pass what `evaluate` wrote"
    ):
        read_evaluation(own_run)
    with pytest.raises(NotAStore, match="not an evaluation"):
        read_evaluation(tmp_path / "nothing")
    folder = Path(shutil.copytree(Path(figures["saved"]).parent, tmp_path / "evaluation"))
    record = folder / "evaluation.json"
    record.write_bytes(record.read_bytes().replace(b'"windows": 1', b'"windows": 2'))
    with pytest.raises(DamagedStore, match="is not the object that was sealed"):
        read_evaluation(folder)
    (folder / "seal.json").unlink()
    with pytest.raises(IncompleteStore, match="is not finished"):
        read_evaluation(folder)


def test_a_folder_that_cannot_be_written_to_costs_only_the_file(
    store: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = evaluate(EvaluateConfig(run=own, store=store, windows=2, device="cpu"))
    assert found["saved"] is None
    assert {path.name for path in own.iterdir()} == {path.name for path in run.iterdir()}
    assert "cannot be written to" in evaluation_lines(found)[-1]


# Refusals


def test_another_model_is_refused(store: Path, run: Path, texts: Path, tmp_path: Path) -> None:
    other = build_model(tmp_path / "other", texts, seed=1)
    with pytest.raises(IdentityMismatch, match=r"model .*other: has weights .*name the right one with --model"):
        evaluate(EvaluateConfig(run=run, store=store, model=str(other), device="cpu"))


def test_a_run_of_another_model_is_refused(store: Path, run: Path, tmp_path: Path) -> None:
    sae, record = load_run(run)
    save_run(tmp_path / "run", sae, replace(record, weights_sha256="f" * 64))
    with pytest.raises(IdentityMismatch, match="the SAE was trained on a model with weights ffffffffffff"):
        evaluate(EvaluateConfig(run=tmp_path / "run", store=store, device="cpu"))


def test_a_store_without_heldout_documents_is_refused(texts: Path, model_folder: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    collect(CollectConfig(out=out, model=str(model_folder), corpus=str(texts / "story00.txt"), layer=(2,), context=32))
    with pytest.raises(InputError, match="holds no held-out documents; collect more text"):
        evaluate(EvaluateConfig(run=run, store=out, device="cpu"))


def test_as_many_components_as_dimensions_are_refused(store: Path, run: Path) -> None:
    with pytest.raises(InputError, match="pca 32: rows have 32 dimensions; choose --pca 31 or less"):
        evaluate(EvaluateConfig(run=run, store=store, pca=32, device="cpu"))


@pytest.mark.parametrize("asked", [{"windows": 0}, {"pca": 0}])
def test_no_windows_or_components_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="need at least 1"):
        EvaluateConfig(run=Path("r"), store=Path("s"), **asked)
