"""Patching all restores the clean logits, patching nothing changes nothing, and a planted circuit is found."""

from __future__ import annotations

import math

import circuitkit
import pytest
import torch
from circuitkit import CHANNEL, CLEAN, CORRUPT, FEATURE, HEAD, LAYER, PLACE, clean_and_corrupt, planted_model, planted_sae
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.errors import InputError
from pipelines.causal.engine.answer_metrics import Divergence, change_metric, log_probability_of, pair_metric
from pipelines.causal.engine.trace import after_edits, trace
from pipelines.causal.patch.gradient_estimates import (
    activation_effects,
    feature_effects,
    gradients,
    integrated_gradients,
)
from pipelines.causal.patch.patch_grid import (
    Pair,
    dense_codes,
    feature_cells,
    feature_grid,
    patch_activation,
    patch_grid,
    run_logits,
)
from pipelines.models.capture import hooked
from pipelines.models.sites.registry import patched_names
from pipelines.models.sites.site import Site


@pytest.fixture(scope="module")
def planted() -> nn.Module:
    return planted_model()


@pytest.fixture(scope="module")
def random() -> nn.Module:
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    torch.manual_seed(2)  # not the weights that transformers draws, which change with its version
    for name, weight in model.named_parameters():
        if "ln_" not in name and not name.endswith("bias"):
            weight.normal_(std=0.12)
    return model.double()


def pair_of(model: nn.Module, direction: str = "denoising") -> Pair:
    clean, corrupt = (trace(model, ids) for ids in clean_and_corrupt())
    return Pair(clean, corrupt, direction)


def difference(model: nn.Module, pair: Pair):
    return pair_metric("logit_difference", run_logits(model, pair.clean), run_logits(model, pair.corrupt), CLEAN, CORRUPT)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_everything_gives_the_other_run_and_nothing_its_own(random: nn.Module, direction: str) -> None:
    pair = pair_of(random, direction)
    source, into = run_logits(random, pair.source), run_logits(random, pair.into)
    assert (source - into).abs().max() > 0.1
    for layer in range(3):
        whole = patch_activation(random, pair, Site("resid_pre", layer))
        torch.testing.assert_close(whole, source, rtol=0, atol=1e-5)
    torch.testing.assert_close(patch_activation(random, pair, Site("resid_post", 2), [-1]), source, rtol=0, atol=1e-5)
    for name in patched_names():
        torch.testing.assert_close(patch_activation(random, pair, Site(name, 1), []), into, rtol=0, atol=1e-9)
        torch.testing.assert_close(patch_activation(random, pair, Site(name, 1), [0, 1]), into, rtol=0, atol=1e-9)
    torch.testing.assert_close(patch_activation(random, pair, Site("head_out", 1), heads=[]), into, rtol=0, atol=1e-9)


def test_a_run_patched_with_itself_stays_as_it_is(random: nn.Module) -> None:
    clean = trace(random, clean_and_corrupt()[0])
    pair = Pair(clean, clean)
    for name in patched_names():
        grid = patch_grid(random, pair, name, log_probability_of(CLEAN))
        expected = log_probability_of(CLEAN)(run_logits(random, clean))
        torch.testing.assert_close(grid.values, expected.expand_as(grid.values), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_a_grid_is_what_hooks_in_the_whole_model_give_cell_by_cell(random: nn.Module, name: str) -> None:
    pair = pair_of(random)
    metric = difference(random, pair)
    grid = patch_grid(random, pair, name, metric.of)
    assert grid.rows == tuple(f"{name}.{layer}" for layer in range(3))
    for layer in range(3):
        for column in range(8):
            place = slice(None) if column == 7 else column

            def edit(x: torch.Tensor, layer: int = layer, place: int | slice = place) -> torch.Tensor:
                changed = x.clone()
                changed[0, place] = pair.clean.at(Site(name, layer))[place]
                return changed

            with hooked(random, Site(name, layer), edit):
                found = random(input_ids=pair.corrupt.ids[None], use_cache=False).logits[0, -1]
            assert float(grid.values[layer, column]) == pytest.approx(float(metric.of(found)), abs=1e-8)


def test_the_effect_is_one_for_the_clean_run_and_zero_for_the_corrupt_one(random: nn.Module) -> None:
    for direction, ends in (("denoising", (1.0, 0.0)), ("noising", (0.0, 1.0))):
        pair = pair_of(random, direction)
        grid = patch_grid(random, pair, "resid_pre", difference(random, pair).of)
        torch.testing.assert_close(grid.values[:, -1], torch.full((3,), ends[0], dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(grid.values[:, :PLACE], torch.full((3, PLACE), ends[1], dtype=torch.float64))


def test_other_metrics_are_probability_and_divergence_by_their_definitions(random: nn.Module) -> None:
    pair = pair_of(random)
    clean, corrupt = run_logits(random, pair.clean), run_logits(random, pair.corrupt)
    patched = patch_activation(random, pair, Site("attn_out", 1), [PLACE])
    p, q = (logits.softmax(dim=-1) for logits in (clean, patched))
    kl = pair_metric("kl", clean, corrupt, CLEAN, CORRUPT)
    assert float(kl.of(patched)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-9)
    assert kl.clean == 0
    probability = pair_metric("probability", clean, corrupt, CLEAN, CORRUPT)
    assert float(probability.of(patched)) == pytest.approx(float(q[CLEAN]))
    assert (probability.clean, probability.corrupt) == pytest.approx((float(p[CLEAN]), float(corrupt.softmax(-1)[CLEAN])))
    change = change_metric("log_probability", clean, CLEAN, None)
    assert float(change.of(patched)) == pytest.approx(float((q[CLEAN] / p[CLEAN]).log()))


def test_a_small_denominator_is_refused_with_both_values(random: nn.Module) -> None:
    logits = run_logits(random, pair_of(random).clean)
    nearby = logits.clone()
    nearby[CLEAN] += 0.09
    with pytest.raises(
        InputError, match=r"is -?\d+\.\d+ in the clean and -?\d+\.\d+ in the corrupt run, less than 0\.1 apart"
    ):
        pair_metric("logit_difference", logits, nearby, CLEAN, CORRUPT)
    nearby[CLEAN] += 0.02
    pair_metric("logit_difference", logits, nearby, CLEAN, CORRUPT)


def test_the_planted_head_and_its_path_are_found_by_patching(planted: nn.Module) -> None:
    pair = pair_of(planted)
    metric = difference(planted, pair)
    heads = patch_grid(planted, pair, "head_out", metric.of)
    order = heads.values[:, -1].abs().argsort(descending=True)
    assert heads.rows[int(order[0])] == f"L{LAYER}H{HEAD}"
    assert float(heads.values[order[0], -1]) > 0.95
    assert float(heads.values[order[1], -1].abs()) < 0.05
    assert int(heads.values[order[0], :-1].argmax()) == len(pair.clean) - 1
    stream = patch_grid(planted, pair, "resid_pre", metric.of).values
    assert (stream[: LAYER + 1, PLACE] > 0.95).all()
    after = patch_grid(planted, pair, "resid_post", metric.of).values[LAYER]
    assert after[PLACE] < 1e-6
    assert after[len(pair.clean) - 1] == pytest.approx(1)


def test_the_planted_head_is_found_by_attribution_patching(planted: nn.Module) -> None:
    pair = pair_of(planted)
    sites = [Site("head_out", layer) for layer in range(2)]
    slopes = gradients(planted, pair.into, sites, difference(planted, pair).of)
    effects = torch.cat([activation_effects(pair.into, pair.source, s, slopes[s.label], 4) for s in sites]).sum(dim=1)
    assert int(effects.abs().argmax()) == LAYER * 4 + HEAD
    assert effects[LAYER * 4 + HEAD] > 3 * effects.abs().sort(descending=True).values[1]


def test_the_planted_feature_is_found_by_patching_and_attribution_patching(planted: nn.Module) -> None:
    pair, sae, site = pair_of(planted), planted_sae(), Site("resid_post", 0)
    metric, kept = difference(planted, pair), torch.tensor([False] + [True] * 6)
    change = dense_codes(sae, pair.source.at(site), kept) - dense_codes(sae, pair.into.at(site), kept)
    grid = feature_grid(planted, pair.into, site, sae, list(range(8)), change, kept, metric.of)
    slope = gradients(planted, pair.into, [site], metric.of)[site.label]
    estimate = feature_effects(change, sae, slope)
    assert bool(grid.values[:, 0].isnan().all()), "the first position is no row"
    assert bool(grid.values[:, 1:].isfinite().all())
    assert divmod(int(grid.values[:, 1:-1].argmax()), 6) == (FEATURE, PLACE - 1)
    assert float(grid.values[FEATURE, PLACE]) > 0.9
    assert float(grid.values[FEATURE, -1]) == pytest.approx(float(grid.values[FEATURE, PLACE]))
    assert divmod(int(estimate.abs().argmax()), 8) == (PLACE, FEATURE)
    assert CHANNEL == 0


def test_positions_that_are_no_rows_pass_through(planted: nn.Module) -> None:
    """A feature whose code would differ at an excluded position is not patched there."""
    pair, sae, site = pair_of(planted), planted_sae(), Site("resid_post", 0)
    kept = torch.ones(7, dtype=torch.bool)
    kept[PLACE] = False
    change = dense_codes(sae, pair.source.at(site), kept) - dense_codes(sae, pair.into.at(site), kept)
    metric = difference(planted, pair)
    everywhere = feature_cells(planted, pair.into, site, sae, change, torch.tensor([FEATURE]), torch.tensor([7]), metric.of)
    assert float(change[PLACE].abs().sum()) == 0
    assert abs(float(everywhere)) < 1e-6


def test_a_feature_edit_changes_its_own_code_alone(random: nn.Module) -> None:
    """x + change · W_dec, the error kept: against the logits of exactly that stream."""
    clean = trace(random, clean_and_corrupt()[0])
    sae, site, kept = (
        circuitkit.TopKSae(32, 24, 4, seed=5).double().requires_grad_(False),
        Site("mlp_out", 1),
        torch.ones(7, dtype=torch.bool),
    )
    change = -dense_codes(sae, clean.at(site), kept)
    feature = int(change.abs().sum(dim=0).argmax())
    found = feature_cells(
        random, clean, site, sae, change, torch.tensor([feature]), torch.tensor([7]), log_probability_of(CLEAN)
    )

    def edit(x: torch.Tensor) -> torch.Tensor:
        return x + change[:, feature, None] * sae.W_dec[feature]

    with hooked(random, site, edit):
        logits = random(input_ids=clean.ids[None], use_cache=False).logits[0, -1]
    assert float(found) == pytest.approx(float(log_probability_of(CLEAN)(logits)), abs=1e-9)
    assert float(found) != pytest.approx(float(log_probability_of(CLEAN)(run_logits(random, clean))), abs=1e-6)


def test_gradients_are_the_derivatives_of_the_exact_intervention(random: nn.Module) -> None:
    run, figure = trace(random, clean_and_corrupt()[0]), log_probability_of(CLEAN)
    sites = [Site(name, 1) for name in patched_names()]
    slopes = gradients(random, run, sites, figure)
    for site in sites:
        nudge = torch.randn(run.at(site).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
        up, down = figure(after_edits(random, run, site, torch.stack([run.at(site) + nudge, run.at(site) - nudge])))
        expected = float(up - down) / 2
        assert float((slopes[site.label] * nudge).sum()) == pytest.approx(expected, rel=1e-4), site.label


def test_the_gradient_of_kl_is_refused_at_the_clean_run_and_integrated_gradients_add_up(random: nn.Module) -> None:
    pair, site = pair_of(random, "noising"), Site("resid_pre", 1)
    figure = Divergence(run_logits(random, pair.clean))
    with pytest.raises(InputError, match=r"gradient of KL is zero at the clean run.*integrated gradients"):
        gradients(random, pair.clean, [site], figure)
    with pytest.raises(InputError, match="gradient of KL is zero at the clean run"):
        gradients(random, pair.clean, [site], change_metric("kl", run_logits(random, pair.clean), CLEAN, None).of)
    slope = gradients(random, pair.corrupt, [site], figure)[site.label]
    nudge = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    ends = torch.stack([pair.corrupt.at(site) + nudge, pair.corrupt.at(site) - nudge])
    up, down = figure(after_edits(random, pair.corrupt, site, ends))
    assert float((slope * nudge).sum()) == pytest.approx(float(up - down) / 2, rel=1e-4), "elsewhere it has one"
    other = pair.corrupt.at(site)
    whole = float(figure(run_logits(random, pair.corrupt)))
    slope = integrated_gradients(random, pair.clean, site, other, figure, steps=64)
    assert float(((other - pair.clean.at(site)) * slope).sum()) == pytest.approx(whole, rel=0.01)
    assert whole > 0.01


def test_no_hook_or_gradient_is_left_behind_also_after_an_exception(random: nn.Module) -> None:
    run = trace(random, clean_and_corrupt()[0])
    sites = [Site(name, layer) for name in patched_names() for layer in range(3)]

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        gradients(random, run, sites, fails)
    gradients(random, run, sites, log_probability_of(CLEAN))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in random.modules())
    loose = planted_model().requires_grad_(True)  # as transformers loads it
    gradients(loose, trace(loose, clean_and_corrupt()[0]), sites[:1], log_probability_of(CLEAN))
    assert all(weight.grad is None for weight in loose.parameters())


def test_kl_is_never_below_zero_and_finite_however_large_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, generator=generator) * 100
    others = torch.cat([reference[None] + 1e-7, torch.randn(20, 50, generator=generator) * 100])
    found = Divergence(reference)(others)
    assert bool((found >= 0).all())
    assert all(math.isfinite(value) for value in found.tolist())


def test_texts_of_unequal_length_and_unknown_directions_are_refused(random: nn.Module) -> None:
    clean, corrupt = clean_and_corrupt()
    with pytest.raises(InputError, match="the clean text has 7 tokens, the corrupt one 6"):
        Pair(trace(random, clean), trace(random, corrupt[:-1]))
    with pytest.raises(InputError, match="direction 'sideways': known are denoising and noising"):
        Pair(trace(random, clean), trace(random, corrupt), "sideways")
