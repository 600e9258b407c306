"""Every figure of `evaluate` against its definition, and the refusals: held-out text only, the same model only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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

from actstore.errors import IdentityMismatch, InputError
from actstore.reader import ActivationStore
from pipelines.capture import Site, load_model
from pipelines.collect import collect
from pipelines.evaluate import (
    EvaluateConfig,
    _window_batches,
    evaluate,
    evaluate_rows,
    evaluate_text,
    held_out_windows,
    linear_fve,
    pca_basis,
)
from pipelines.recipe import CollectConfig
from pipelines.sae.checkpoint import load_run, save_run
from pipelines.sae.topk import TopKSae
from pipelines.windows import Windows

SITE = "resid_post.2"
ALL = 10_000


@pytest.fixture(scope="module")
def figures(store: Path, run: Path) -> dict[str, Any]:
    return evaluate(EvaluateConfig(run=run, store=store, windows=ALL, device="cpu"))


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
    fired = np.unique(indices.numpy()[codes > 0])
    expected = {
        "heldout_rows": len(x),
        "fve": 1 - error / (np.square(x).sum(axis=1).mean() - np.square(x.mean(axis=0)).sum()),
        "mse": error / D_MODEL,
        "l0": (codes > 0).sum(axis=1).mean(),
        "cosine": ((x * guess).sum(axis=1) / norms / guess_norms).mean(),
        "l2_ratio": (guess_norms / norms).mean(),
        "never_fired_heldout": 1 - len(fired) / 64,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)


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
    assert linear_fve(opened, SITE, basis, mean) == pytest.approx(1, abs=1e-9)
    assert linear_fve(opened, SITE, basis[:, :-1], mean) < 1


def test_the_dead_features_are_those_the_training_counted(run: Path, figures: dict[str, Any]) -> None:
    metrics = load_run(run)[1].metrics
    assert figures["dead_features"] == metrics["dead_features"]
    assert figures["dead_share"] == metrics["dead_features"] / 64


# Text


def replaced_by(rows: Callable[[Tensor], Tensor]) -> TopKSae:
    """What `evaluate_text` takes for an SAE: its reconstruction is any function of the rows."""
    return cast(TopKSae, lambda x: (rows(x),))


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
    found = evaluate_text(replaced_by(lambda rows: rows), model, opened, Site("resid_post", 2), ALL, "cpu")
    assert (found["delta_ce"], found["kl"]) == (0, 0)
    assert (found["ce_loss_score"], found["ce_loss_score_mean"]) == (1, 1)
    assert found["ce_clean"] == figures["ce_clean"]


def test_the_losses_are_those_of_transformers_with_a_hook_of_our_own(
    opened: ActivationStore, model_folder: Path, figures: dict[str, Any]
) -> None:
    mean = torch.from_numpy(rows_of(opened, "train").mean(axis=0)).float()
    for name, row in {"ce_clean": None, "ce_zero": torch.zeros(D_MODEL), "ce_mean": mean}.items():
        assert figures[name] == pytest.approx(plain_loss(opened, model_folder, row), rel=1e-5), name
    assert figures["text_tokens"] == sum(ids.shape[1] - 1 for ids, _ in plain_windows(opened))


def test_the_scores_follow_their_definitions(figures: dict[str, Any]) -> None:
    clean, sae, zero, mean = (figures[f"ce_{name}"] for name in ("clean", "sae", "zero", "mean"))
    assert figures["delta_ce"] == sae - clean
    assert figures["ce_loss_score"] == (zero - sae) / (zero - clean)
    assert figures["ce_loss_score_mean"] == (mean - sae) / (mean - clean)


def test_the_divergence_is_never_negative_and_that_of_the_definition(
    opened: ActivationStore, model: torch.nn.Module, model_folder: Path
) -> None:
    row = torch.full((D_MODEL,), 0.5)
    found = evaluate_text(replaced_by(lambda rows: row.expand_as(rows)), model, opened, Site("resid_post", 2), ALL, "cpu")
    expected = n_targets = 0.0
    for ids, kept in plain_windows(opened):
        with torch.inference_mode():
            clean = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            hidden = torch.where(kept[..., None], row, _block_output(model, ids))
            changed = model.lm_head(model.transformer.ln_f(hidden))[0, :-1].double().log_softmax(-1)
        expected += float((clean.exp() * (clean - changed)).sum())
        n_targets += len(clean)
    assert found["kl"] == pytest.approx(expected / n_targets, rel=1e-4)
    assert found["kl"] > 0


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
    rows = evaluate_rows(sae, ActivationStore(bare), SITE)
    text = evaluate_text(sae, model, ActivationStore(bare), Site.parse(SITE), ALL, "cpu")
    assert rows | text == {name: figures[name] for name in rows | text}
    heldout = opened.table(0, "documents/heldout")
    offsets = opened.table(0, "documents/offsets")
    for windows in held_out_windows(opened):
        document = np.searchsorted(offsets, windows.token_start, side="right") - 1
        assert heldout[document].all()


def test_a_number_of_windows_is_that_over_all_segments() -> None:
    segments = [cast(Windows, range(n)) for n in (50, 0, 30, 1)]
    for asked, expected in [(1, 1), (7, 7), (40, 40), (81, 81), (1000, 81)]:
        batches = _window_batches(segments, asked, 16)
        assert sum(len(chosen) for _, chosen in batches) == expected
        assert all(0 < len(chosen) <= 16 and chosen.max() < len(windows) for windows, chosen in batches)
        chosen = [(segments.index(windows), int(w)) for windows, own in batches for w in own]
        assert chosen == sorted(set(chosen))


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
