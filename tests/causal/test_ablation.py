"""Ablation changes one feature and nothing else, against the model run with a hook written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import build_model
from torch import Tensor

from actstore.errors import IdentityMismatch, InputError
from pipelines.analysis.reader import Analysis
from pipelines.causal.ablate.feature_edits import Edit, Read, ablate, one_by_one, read_prompt, set_everywhere
from pipelines.causal.ablate.stage import AblateConfig, ablate_features, ablate_lines
from pipelines.causal.engine.branches import finish_branches
from pipelines.causal.engine.candidates import top_candidates
from pipelines.causal.engine.cut import cut_at, finish
from pipelines.causal.engine.language_model import Spliced, open_spliced
from pipelines.metrics.divergence import kl
from pipelines.models.forward import blocks_of, logits
from pipelines.models.sites.site import Site

TEXT = "The fox 31 went to the wood, and saw 4 friends"
SITES = [Site("resid_pre", 1), Site("resid_post", 1), Site("resid_post", 2), Site("attn_out", 1), Site("mlp_out", 2)]


@pytest.fixture(scope="module")
def spliced(run: Path) -> Spliced:
    return open_spliced(run, device="cpu")


@pytest.fixture(scope="module")
def read(spliced: Spliced) -> Read:
    return read_prompt(spliced, spliced.lm.prompt(TEXT), list(range(spliced.record.n_features)))


def firing(read: Read) -> list[int]:
    return [f for f in range(64) if read.fires_at(f)]


def by_hand(read: Read, feature: int, *, drop: bool) -> Tensor:
    """(position, vocabulary) logits of the whole model with a feature zeroed where it fires, by dense arithmetic."""
    sae, prompt, model = read.spliced.sae, read.prompt, read.spliced.lm.model

    def edit(_: Any, __: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        pre = (x[0] - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        top = pre.topk(sae.k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        without = codes.clone()
        without[:, feature] = 0
        new = without @ sae.W_dec + sae.b_dec if drop else x[0] + (without - codes) @ sae.W_dec
        changed = torch.where(prompt.kept[:, None], new, x[0])[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks_of(model)[read.spliced.site.layer].register_forward_hook(edit)
    try:
        with torch.no_grad():
            found: Tensor = model(input_ids=prompt.ids[None], use_cache=False).logits[0]
            return found
    finally:
        handle.remove()


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.label)
def test_a_branch_is_the_whole_texts_forward_pass_at_the_edited_position(spliced: Spliced, site: Site) -> None:
    model, generator = spliced.lm.model, torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (2, 20), generator=generator)
    at = torch.randint(0, 20, (2, 5), generator=generator)
    change = torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        reading = cut_at(model, site, ids)
        clean, branches = finish_branches(model, reading, change, at)
        torch.testing.assert_close(logits(model, clean), model(input_ids=ids).logits, rtol=0, atol=1e-4)
        for text in range(2):
            own = reading.take(torch.tensor([text]))
            for branch in range(5):
                edited = own.x.clone()
                edited[0, at[text, branch]] += change[text, branch]
                whole = finish(model, own, edited)[0, at[text, branch]]
                torch.testing.assert_close(branches[text, branch], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drop", [False, True], ids=["keep", "drop"])
def test_the_logits_are_those_of_the_model_with_the_feature_taken_out_by_a_hook(read: Read, drop: bool) -> None:
    features = firing(read)
    assert len(features) > 5
    found = ablate(read, [set_everywhere(read, f) for f in features], "drop" if drop else "keep")
    with torch.no_grad():
        normal = read.spliced.lm.model(input_ids=read.prompt.ids[None], use_cache=False).logits[0]
    for i, feature in enumerate(features):
        expected = by_hand(read, feature, drop=drop)
        torch.testing.assert_close(read.logits(found.hidden[i]), expected[-1], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.normal_ablated[i], kl(normal, expected), rtol=1e-3, atol=1e-6)


def test_a_feature_that_does_not_fire_changes_nothing_bit_for_bit(read: Read) -> None:
    edits = [set_everywhere(read, f) for f in range(64)]
    silent = [f for f in range(64) if not read.fires_at(f)]
    assert 0 < len(silent) < 64
    found = ablate(read, edits)
    assert all(torch.equal(read.logits(found.hidden[f]), read.logits(read.normal[-1])) for f in silent)
    assert float(found.normal_ablated[silent].abs().max()) == 0
    moved = [f for f in firing(read) if float(found.normal_ablated[f].max()) > 0]
    assert len(moved) == len(firing(read))


def test_nothing_before_the_first_edited_position_changes_bit_for_bit(read: Read) -> None:
    feature = firing(read)[0]
    place = read.fires_at(feature)[-1]
    found = ablate(read, [Edit.of(feature, [place])])
    assert float(found.normal_ablated[0, :place].abs().max()) == 0
    assert float(found.normal_ablated[0, place:].max()) > 0


def test_many_features_in_one_batch_are_what_each_is_alone(read: Read) -> None:
    edits = [set_everywhere(read, f) for f in firing(read)[:6]]
    together = ablate(read, edits)
    for i, edit in enumerate(edits):
        alone = ablate(read, [edit])
        torch.testing.assert_close(together.normal_ablated[i], alone.normal_ablated[0], rtol=1e-4, atol=1e-9)


def test_the_reconstructions_own_error_is_told_apart(read: Read) -> None:
    feature = next(f for f in range(64) if not read.fires_at(f))
    found = ablate(read, [set_everywhere(read, feature)], "drop")
    assert found.normal_reconstruction is not None
    assert found.reconstruction_ablated is not None
    assert float(found.normal_reconstruction[-1]) > 0
    assert float(found.reconstruction_ablated.abs().max()) == 0
    torch.testing.assert_close(found.normal_ablated[0], found.normal_reconstruction)


def test_excluded_positions_pass_through_unreplaced(read: Read) -> None:
    assert not bool(read.prompt.kept[0])
    assert torch.equal(read.reconstruction[0], read.rows[0])
    assert float(read.codes[0].abs().max()) == 0
    with pytest.raises(InputError, match=r"feature 99: is not among those the prompt was read for"):
        ablate(read, [Edit.of(99, [1])])
    with pytest.raises(InputError, match=r"position 0: is no row of this prompt; rows are 1 to \d+\."):
        ablate(read, [Edit.of(0, [0])])


def test_one_by_one_edits_each_position_alone(read: Read) -> None:
    feature = max(firing(read), key=lambda f: len(read.fires_at(f)))
    places = read.fires_at(feature)
    assert len(places) > 1
    singles = one_by_one(set_everywhere(read, feature))
    assert [edit.positions for edit in singles] == [(place,) for place in places]
    assert set_everywhere(read, feature, at="last").positions == (len(read.prompt) - 1,)


def test_no_hook_is_left_behind_also_after_an_exception(spliced: Spliced) -> None:
    model = spliced.lm.model
    reading = cut_at(model, Site("attn_out", 1), torch.arange(1, 9)[None])

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with pytest.raises(RuntimeError):
        finish(model, reading, torch.zeros(1, 8, 31))
    with pytest.raises((RuntimeError, IndexError)):
        finish_branches(model, reading, torch.zeros(1, 2, 31), torch.zeros(1, 2, dtype=torch.int64))
    assert hooks() == before


def test_kl_is_never_negative_and_finite_and_the_definitions() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    normal = rng.normal(size=(300, 50))
    scale = np.repeat([0.0, 1e-7, 1e-3, 1.0, 30.0, 1e4], 50)[:, None]
    other = normal + scale * rng.normal(size=(300, 50))
    found = kl(torch.from_numpy(normal).float(), torch.from_numpy(other).float()).numpy()
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found[:50] == 0).all()
    a, b = (x.astype(np.float32).astype(np.longdouble) for x in (normal, other))
    log_p, log_q = (x - x.max(1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (log_p, log_q))
    reference = (np.exp(log_p) * (log_p - log_q)).sum(1).astype(np.float64)
    np.testing.assert_allclose(found, reference, rtol=1e-6, atol=1e-15)


def test_an_id_that_the_tokenizer_does_not_have_shows_as_its_number(read: Read) -> None:
    """Models are padded: a prediction may put such an id first."""
    logits = torch.zeros(4200)
    logits[4100] = 9.0
    assert top_candidates(logits, read.spliced.lm.codec, 1)[0].text == "<4100>"


def test_the_command_says_what_ablation_did(run: Path, read: Read) -> None:
    found = ablate_features(AblateConfig(run, TEXT, features=3, top=4, device="cpu"))
    exact = ablate(read, [set_everywhere(read, f) for f in firing(read)]).normal_ablated[:, -1]
    best = exact.argsort(descending=True)[:3]
    assert [own["feature"] for own in found["features"]] == [firing(read)[i] for i in best.tolist()]
    assert [own["kl"] for own in found["features"]] == pytest.approx(exact[best].tolist(), rel=1e-4)
    expected = top_candidates(read.logits(read.normal[-1]), read.spliced.lm.codec, 4)
    assert [own["token"] for own in found["normal"]] == [own.token for own in expected]
    lines = ablate_lines(found)
    assert "error term kept" in lines[1]
    assert len([line for line in lines if line.startswith("feature ")]) == 3
    dropped = ablate_features(AblateConfig(run, TEXT, feature=(3,), error="drop", device="cpu"))
    assert dropped["kl_normal_reconstruction"] > 0
    assert "KL(normal ‖ reconstruction)" in "\n".join(ablate_lines(dropped))


def test_a_feature_is_set_to_its_mean_or_to_what_a_seed_draws(run: Path, read: Read, analysis: Path, codes: Path) -> None:
    feature = firing(read)[0]

    def value(**options: Any) -> float:
        found = ablate_features(AblateConfig(run, TEXT, feature=(feature,), device="cpu", **options))
        values: list[float] = found["features"][0]["values"]
        assert len(set(values)) == 1
        return values[0]

    opened = Analysis(analysis)
    assert value(set_to="mean", analysis=analysis) == pytest.approx(
        opened.mean[feature] * opened.frequency[feature], rel=1e-6
    )
    kept = read.codes[read.prompt.kept, feature]
    assert value(set_to="mean") == pytest.approx(float(kept.mean()), rel=1e-5)
    drawn = [value(set_to="firing", codes=codes, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] > 0
    assert len(set(drawn)) > 1
    assert 0.0 in {value(set_to="row", codes=codes, seed=seed) for seed in range(6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": (64,)}, r"feature 64: the SAE has 64 features; choose 0 to 63\."),
        ({"feature": (-1,)}, r"feature -1: the SAE has 64 features"),
        ({"text": ""}, "has no token; give some text"),
        ({"text": "fox " * 100}, r"tokens with the start token, the model has 64 positions; shorten it"),
        ({"set_to": "one"}, r"set_to 'one': choose one of zero, mean, firing, row\."),
        ({"set_to": "row"}, r"name it with --codes"),
        ({"error": "lose"}, r"error 'lose': choose one of keep, drop\."),
    ],
)
def test_what_cannot_be_ablated_is_refused(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablate_features(AblateConfig(**{"run": run, "text": TEXT, "device": "cpu", **options}))


def test_a_store_without_the_saes_layer_or_of_another_model_is_refused(
    run: Path, small_store: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the SAE reads resid_post\.2, .* holds resid_post\.0"):
        ablate_features(AblateConfig(run, TEXT, store=str(small_store), device="cpu"))
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.stage import collect

    other = build_model(tmp_path / "other", texts, seed=1)
    collect(CollectConfig(out=tmp_path / "store", model=str(other), corpus=str(texts), layer=(2,), tokens=800, context=32))
    with pytest.raises(IdentityMismatch, match="pass a store of the same model"):
        ablate_features(AblateConfig(run, TEXT, store=str(tmp_path / "store"), device="cpu"))
    with pytest.raises(IdentityMismatch, match="name the right one with --model"):
        ablate_features(AblateConfig(run, TEXT, model=str(other), device="cpu"))
