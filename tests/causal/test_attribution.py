"""The parts of a logit: they sum to it, each is what it says, and leaving the final LayerNorm out is something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.errors import InputError
from pipelines.causal.attribute.logit_parts import (
    attribute_logit,
    direct_logit_attribution,
    feature_parts,
    normed,
    require_position,
    stream_parts,
    top_movers,
)
from pipelines.causal.engine.trace import trace
from pipelines.models.load import load_model
from pipelines.models.sites.site import Site
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run

OUTLIERS = [3, 17, 25]


def random_model(*, planted: bool) -> GPT2LMHeadModel:
    """Random weights and random biases everywhere; `planted`: a first position 30 times as large, three outlier channels."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            weight.add_(torch.randn(weight.shape) / 5)
    if planted:
        model.transformer.wpe.weight[0] *= 30 / model.transformer.wpe.weight[0].norm() * 32**0.5
        model.transformer.h[0].mlp.c_proj.bias[OUTLIERS] = torch.tensor([400.0, -250.0, 90.0])
    return model


def model_of(name: str) -> nn.Module:
    return load_model("builtin", "cpu", "fp32") if name == "trained" else random_model(planted=name == "planted")


IDS = torch.tensor([0, 7, 31, 8, 8, 52, 1, 40, 33])


@pytest.fixture(scope="module", params=["random", "planted", "trained"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param).double().requires_grad_(False)


@pytest.mark.parametrize("position", [0, 4, -1])
@pytest.mark.parametrize("by_head", [True, False])
def test_the_parts_sum_to_the_models_logit(model: nn.Module, by_head: bool, position: int) -> None:
    expected = model(input_ids=IDS[None], use_cache=False).logits[0, position]
    for target, against, centred in [(40, None, False), (40, None, True), (7, 52, True)]:
        found = direct_logit_attribution(model, IDS, target, against, position, by_head=by_head, centred=centred)
        value = expected[target] - (expected[against] if against is not None else expected.mean() * centred)
        size = found.shares.abs().sum()
        assert abs(found.shares.sum() - value) <= 1e-5 * size
        assert abs(found.logit - value) <= 1e-9 * size
        assert found.deviation == pytest.approx(float(abs(found.shares.sum() - found.logit) / size), abs=1e-12)


def test_the_planted_model_has_a_large_first_position_and_outlier_channels() -> None:
    run = trace(random_model(planted=True), IDS)
    norms = run.streams[0].norm(dim=1)
    assert norms[0] > 25 * norms[1:].mean()
    assert set(run.streams[-1, 1:].abs().mean(dim=0).topk(3).indices.tolist()) == set(OUTLIERS)


def test_a_head_is_z_times_its_rows_of_the_output_weights(model: nn.Module) -> None:
    """Against ten lines of numpy: attention by its definition, from the stream that enters the block."""
    run = trace(model, IDS)
    layer, head, n_heads = 1, 2, model.config.num_attention_heads  # type: ignore[union-attr]
    block = model.transformer.h[layer]  # type: ignore[union-attr, index]
    x = run.streams[layer].numpy()
    centred = x - x.mean(axis=1, keepdims=True)
    ln = (
        centred / np.sqrt(x.var(axis=1, keepdims=True) + block.ln_1.eps) * block.ln_1.weight.numpy()
        + block.ln_1.bias.numpy()
    )
    qkv = ln @ block.attn.c_attn.weight.numpy() + block.attn.c_attn.bias.numpy()
    width = x.shape[1]
    d = width // n_heads
    q, k, v = (qkv[:, i * width + head * d : i * width + (head + 1) * d] for i in range(3))
    scores = np.where(np.tril(np.ones((len(x), len(x)))) > 0, q @ k.T / np.sqrt(d), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    z = weights / weights.sum(axis=1, keepdims=True) @ v
    written = z @ block.attn.c_proj.weight.numpy()[head * d : (head + 1) * d]
    parts = stream_parts(model, run, 5)
    found = parts.vectors[parts.names.index(f"L{layer}H{head}")]
    np.testing.assert_allclose(found, written[5], atol=1e-8 * np.abs(x).max())
    # and its share: centred, scaled by the run's sigma and gamma, times the token's row of the unembedding
    final, norm = run.streams[-1, 5].numpy(), model.transformer.ln_f  # type: ignore[union-attr]
    sigma = np.sqrt(final.var() + norm.eps)
    share = (written[5] - written[5].mean()) / sigma * norm.weight.numpy() @ model.lm_head.weight[40].numpy()  # type: ignore
    shares = attribute_logit(model, run, parts, 40, position=5, centred=False).shares
    assert float(shares[parts.names.index(f"L{layer}H{head}")]) == pytest.approx(share, rel=1e-6, abs=1e-9)


def test_heads_and_bias_together_are_the_whole_attention(model: nn.Module) -> None:
    run = trace(model, IDS)
    fine, coarse = stream_parts(model, run), stream_parts(model, run, by_head=False)
    own = [i for i, name in enumerate(fine.names) if name.startswith(("L2H", "attn_bias.2"))]
    whole = coarse.vectors[coarse.names.index("attn.2")]
    torch.testing.assert_close(fine.vectors[own].sum(dim=0), whole, rtol=0, atol=1e-9 * float(whole.abs().max() + 1))


def test_a_difference_of_logits_does_not_depend_on_centring(model: nn.Module) -> None:
    first, second = (direct_logit_attribution(model, IDS, 3, 9, centred=centred).shares for centred in (True, False))
    torch.testing.assert_close(first, second)


def test_without_the_final_norm_the_shares_are_no_sum_of_the_logit() -> None:
    model = load_model("builtin", "cpu", "fp32").double().requires_grad_(False)
    right = direct_logit_attribution(model, IDS, 40)
    naive = direct_logit_attribution(model, IDS, 40, final_norm=False)
    assert naive.deviation is None
    assert naive.names == right.names[:-1]
    assert abs(float(naive.shares.sum()) - naive.logit) > 0.01 * float(naive.shares.abs().sum())


def test_top_movers_are_the_largest_shares_over_the_vocabulary(model: nn.Module) -> None:
    run = trace(model, IDS)
    parts = stream_parts(model, run)
    name, up, down = top_movers(model, run, parts, 3)[4]
    n = len(model.lm_head.weight) if len(model.lm_head.weight) < 100 else 60  # type: ignore[union-attr, arg-type]
    shares = {t: float(attribute_logit(model, run, parts, t).shares[4]) for t in {*range(n), *(t for t, _ in [*up, *down])}}
    assert name == parts.names[4]
    for token, value in [*up, *down]:
        assert value == pytest.approx(shares[token], rel=1e-9, abs=1e-12)
    assert up[0][1] >= max(shares.values()) - 1e-12
    assert down[0][1] <= min(shares.values()) + 1e-12


@pytest.mark.parametrize("site", ["resid_pre.2", "resid_post.0", "attn_out.1", "mlp_out.2"])
def test_features_bias_and_error_take_the_place_of_what_the_sae_reads(model: nn.Module, site: str) -> None:
    run, place = trace(model, IDS), Site.parse(site)
    sae = TopKSae(run.streams.shape[-1], 48, 5, seed=2).double()
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(sae.d_model, generator=torch.Generator().manual_seed(3)))
        parts = feature_parts(model, run, place, sae, 6)
        found = attribute_logit(model, run, parts, 40, position=6)
    assert found.deviation is not None
    assert found.deviation <= 1e-9
    read = [i for i, name in enumerate(parts.names) if name.startswith(("feature", "sae"))]
    torch.testing.assert_close(parts.vectors[read].sum(dim=0), run.at(place)[6])
    features = [name for name in parts.names if name.startswith("feature")]
    assert 1 <= len(features) <= 5
    values, indices = sae.encode(run.at(place)[6:7])
    one = int(features[0].split()[1])
    value = float(values.detach()[0, indices[0].tolist().index(one)])
    direct = normed(model, run, parts, 6).vectors[parts.names.index(features[0])]
    norm, sigma = model.transformer.ln_f, float((run.streams[-1, 6].var(correction=0) + 1e-5).sqrt())  # type: ignore
    direction = sae.W_dec[one].detach()
    torch.testing.assert_close(direct, value * norm.weight * (direction - direction.mean()) / sigma)


def test_a_trained_run_splits_too(run: Path, reference: GPT2LMHeadModel) -> None:
    sae, record = load_run(run)
    traced = trace(reference, IDS)
    with torch.no_grad():
        parts = feature_parts(reference, traced, Site.parse(record.site), sae)
        found = attribute_logit(reference, traced, parts, 40)
    assert not any(name.startswith(("L", "mlp", "embed")) for name in parts.names), "the last stream is read whole"
    assert found.deviation is not None
    assert found.deviation < 1e-6


def test_a_position_the_text_has_not_is_refused() -> None:
    run = trace(random_model(planted=False), IDS)
    assert require_position(run, -1) == len(IDS) - 1
    for position in (len(IDS), -len(IDS) - 1):
        with pytest.raises(InputError, match="the text has 9 tokens; choose 0 to 8"):
            require_position(run, position)


def test_nothing_of_it_changes_the_model(model: nn.Module) -> None:
    before: Tensor = model(input_ids=IDS[None], use_cache=False).logits
    direct_logit_attribution(model, IDS, 40)
    assert torch.equal(before, model(input_ids=IDS[None], use_cache=False).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
