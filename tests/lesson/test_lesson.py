"""The textbook's names do what the textbook says: each call against a plain loop, dense codes, or transformers by hand."""

from __future__ import annotations

import copy
import inspect as signatures
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel

from actstore.errors import IdentityMismatch, InputError
from actstore.plan import ROW_ORDER, permutation
from pipelines import lesson
from pipelines.lesson import Collected, SparseAutoencoder, collect_activations, sae_loss, train_sae

N_FEATURES, K, LAYER = 48, 4, 2
TEXTS = ["The fox number 3 went to the wood, and saw", "a mole", "it saw 9 of its friends — “déjà vu”.", "The owl 77 went"]

SIGNATURES = {
    "SparseAutoencoder": "d_model, n_features, k=32",
    "sae_loss": "x, x_reconstructed, features, sparsity_coeff=0.001",
    "direct_logit_attribution": "model, input_ids, target_token_id",
    "activation_patching": "model, clean_input, corrupt_input, component_name, layer_idx",
    "collect_activations": "model_name='gpt2', layer=6, num_samples=1000, max_len=128",
    "train_sae": "activations, d_model=768, n_features=4096, k=32, num_epochs=10, batch_size=256, lr=0.0003, "
    "sparsity_coeff=0.001",
    "inspect_features": "sae, activations, tokenizer, model, texts, layer=6, top_n=5",
    "ablate_feature": "model, sae, tokenizer, text, feature_idx, layer=6",
    "analyze_feature_statistics": "sae, activations, top_n=20",
}
"""What the textbook's calls may be given by place or by name; `run_sae_pipeline` has nothing that must be given."""


@pytest.fixture(scope="module")
def collected(model_folder: Path) -> Collected:
    return collect_activations(str(model_folder), LAYER, num_samples=4, max_len=12, corpus=TEXTS)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """(900, 24) rows of 40 sparse directions beside a constant, float64."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    return 3 * torch.rand(900, 40, generator=generator, dtype=torch.float64) ** 8 @ directions + 1


@pytest.fixture(scope="module")
def sae(collected: Collected) -> SparseAutoencoder:
    return train_sae(collected.activations, 32, N_FEATURES, K, num_epochs=20, batch_size=8, lr=3e-3, seed=1)


def dense_codes(sae: SparseAutoencoder, x: Tensor) -> np.ndarray:
    """(n, n_features) by the definition, in NumPy."""
    weight, bias, centre = (t.detach().numpy() for t in (sae.encoder.weight, sae.encoder.bias, sae.b_pre))
    pre = (x.numpy() - centre) @ weight.T + bias
    kept = pre >= np.sort(pre, axis=1)[:, -sae.k, None]
    return np.where(kept, np.maximum(pre, 0), 0)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_textbooks_calls_fit(name: str) -> None:
    parameters = signatures.signature(getattr(lesson, name)).parameters.values()
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in by_place)
    assert shown == SIGNATURES[name]
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)
    assert name in lesson.__all__


def test_the_pipeline_can_be_called_with_nothing() -> None:
    defaults = {p.name: p.default for p in signatures.signature(lesson.run_sae_pipeline).parameters.values()}
    asked = ("model_name", "layer", "num_samples", "max_len", "num_epochs", "sparsity_coeff")
    assert [defaults[name] for name in asked] == ["gpt2", 6, 200, 64, 15, 5e-4]
    assert len(defaults["sentences"]) == 8


# SparseAutoencoder and its loss


def test_the_autoencoder_is_two_linear_layers_with_unit_columns() -> None:
    sae = SparseAutoencoder(24, 96)
    assert isinstance(sae.encoder, nn.Linear)
    assert (tuple(sae.encoder.weight.shape), tuple(sae.encoder.bias.shape)) == ((96, 24), (96,))
    assert isinstance(sae.decoder, nn.Linear)
    assert tuple(sae.decoder.weight.shape) == (24, 96)
    assert sae.decoder.bias is None
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(96))
    assert (tuple(sae.b_pre.shape), sae.k, len(list(sae.parameters()))) == ((24,), 32, 4)


def test_codes_are_the_k_largest_with_those_below_zero_set_to_zero(rows: Tensor) -> None:
    sae = SparseAutoencoder(24, 8, k=6, seed=3).double()  # 6 of 8: some of the largest are below zero
    with torch.no_grad():
        sae.b_pre.fill_(0.5)
    expected = dense_codes(sae, rows)
    features, indices = sae.encode(rows.view(9, 100, 24))
    assert (tuple(features.shape), tuple(indices.shape)) == ((9, 100, 8), (9, 100, 6))
    np.testing.assert_allclose(features.detach().numpy().reshape(-1, 8), expected, atol=1e-12)
    assert 0 < (expected > 0).sum() < 6 * len(expected)
    assert set(np.nonzero(expected[0])[0]) <= set(indices[0, 0].tolist())
    reconstruction, again, _ = sae(rows)
    by_hand = expected @ sae.decoder.weight.detach().numpy().T + 0.5
    np.testing.assert_allclose(reconstruction.detach().numpy(), by_hand, atol=1e-12)
    assert torch.equal(again, features.view(-1, 8))


def test_the_topk_sae_of_the_same_weights_has_the_same_codes(rows: Tensor) -> None:
    sae = SparseAutoencoder(24, 96, K, seed=5).double()
    sparse = sae.to_sae()
    values, indices = sparse.encode(rows)
    dense = torch.zeros(len(rows), 96, dtype=torch.float64).scatter(1, indices, values.detach())
    torch.testing.assert_close(dense, sae.encode(rows)[0].detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sparse(rows)[0], sae(rows)[0], rtol=0, atol=1e-12)
    back = SparseAutoencoder.from_sae(sparse)
    for name, weight in sae.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name


def test_making_one_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = SparseAutoencoder(8, 16, 2), SparseAutoencoder(8, 16, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.encoder.weight, second.encoder.weight)


def test_the_loss_is_mean_squared_error_and_the_mean_absolute_code() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y, codes = (torch.randn(*shape, generator=generator) for shape in [(3, 5, 7), (3, 5, 7), (3, 5, 11)])
    total, reconstruction, sparsity = sae_loss(x, y, codes, 0.25)
    assert float(reconstruction) == pytest.approx(np.square(x.numpy() - y.numpy()).mean())
    assert float(sparsity) == pytest.approx(np.abs(codes.numpy()).mean())
    assert float(total) == pytest.approx(float(reconstruction) + 0.25 * float(sparsity))


@pytest.mark.parametrize(("d_model", "n_features", "k"), [(8, 16, 17), (8, 16, 0), (0, 16, 1)])
def test_a_shape_that_cannot_be_is_refused(d_model: int, n_features: int, k: int) -> None:
    with pytest.raises(InputError, match=rf"d_model {d_model}, n_features {n_features}, k {k}"):
        SparseAutoencoder(d_model, n_features, k)


# Collecting


def test_rows_are_the_blocks_output_one_text_at_a_time(collected: Collected, model_folder: Path) -> None:
    """The last block's as well: not what `hidden_states` ends with, which is after the final norm."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), GPT2LMHeadModel.from_pretrained(model_folder).eval()
    found: list[Tensor] = []
    model.transformer.h[LAYER].register_forward_hook(
        lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:12]]))
    assert sorted(map(len, found))[-1] == 12, "one text at least is cut"
    torch.testing.assert_close(collected.activations, torch.cat(found), rtol=1e-4, atol=1e-4)
    assert collected.tokenizer.encode("a mole") == tokenizer.encode("a mole")
    assert not collected.model.training


def test_a_block_that_gives_a_tuple_is_read_as_well(collected: Collected, monkeypatch: pytest.MonkeyPatch) -> None:
    block = type(collected.model.transformer.h[0])
    forward = block.forward

    def as_before(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        out = forward(self, *args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    def as_now(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out = forward(self, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    ids = collected.tokenizer.encode(TEXTS[1])
    monkeypatch.setattr(block, "forward", as_now)
    expected = lesson._rows(collected.model, 0, ids)
    monkeypatch.setattr(block, "forward", as_before)
    assert torch.equal(lesson._rows(collected.model, 0, ids), expected)


def test_what_is_collected_can_be_trained_on_by_any_loop(model_folder: Path) -> None:
    x = collect_activations(str(model_folder), 0, 1, 8, corpus=TEXTS[:1]).activations
    sae = SparseAutoencoder(x.shape[1], 16, 2)
    reconstruction, features, _ = sae(x)
    sae_loss(x, reconstruction, features).total.backward()
    assert sae.encoder.weight.grad is not None


def test_a_corpus_by_its_name_gives_its_documents(model_folder: Path, texts: Path, capsys: pytest.CaptureFixture) -> None:
    rows, _, _ = collect_activations(str(model_folder), 0, 100, 16, corpus=str(texts))
    assert len(rows) == 24 * 16
    assert "384 tokens of 24 texts, 32 values each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, r"layer 6: model .*model0 has 3 blocks; choose 0 to 2"),
        ({"layer": 0}, r"max_len 128: model .*model0 has 64 positions"),
        ({"layer": 0, "max_len": 0}, "num_samples 1000, max_len 0"),
        ({"layer": 0, "max_len": 8, "corpus": [""]}, "has no token"),
        ({"layer": 0, "max_len": 8, "corpus": "nowhere/*.txt"}, "no file there"),
    ],
)
def test_what_cannot_be_collected_is_said(asked: dict[str, Any], expected: str, model_folder: Path) -> None:
    with pytest.raises(InputError, match=expected):
        collect_activations(str(model_folder), **asked)


def test_without_network_a_hub_model_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"model no-such/model: .*the hub gave: .*with the network up") as caught:
        lesson.run_sae_pipeline("no-such/model")
    assert "\n" not in str(caught.value)


# Training


def by_hand(rows: Tensor, n_epochs: int, batch: int, lr: float, coefficient: float, seed: int) -> tuple[nn.ModuleDict, list]:
    """The textbook's loop in dense operators, from the same start and in the same order; and its line per epoch."""
    start = SparseAutoencoder(24, N_FEATURES, K, seed=seed)
    encoder, decoder = nn.Linear(24, N_FEATURES).double(), nn.Linear(N_FEATURES, 24, bias=False).double()
    encoder.load_state_dict(start.encoder.state_dict())
    decoder.load_state_dict(start.decoder.state_dict())
    b_pre = nn.Parameter(torch.zeros(24, dtype=torch.float64))
    parameters = [*encoder.parameters(), *decoder.parameters(), b_pre]
    optimiser, lines = torch.optim.Adam(parameters, lr=lr), []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = encoder(x - b_pre)
        top = pre.topk(K, dim=-1)
        features = torch.zeros_like(pre).scatter(-1, top.indices, top.values).relu()
        return decoder(features) + b_pre, features

    for epoch in range(n_epochs):
        parts = []
        for which in torch.from_numpy(permutation(len(rows), seed, ROW_ORDER, epoch)).split(batch):
            x = rows[which]
            reconstruction, features = forward(x)
            parts.append(torch.stack([((x - reconstruction) ** 2).mean(), features.abs().mean()]))
            optimiser.zero_grad()
            (parts[-1][0] + coefficient * parts[-1][1]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            decoder.weight.data /= decoder.weight.data.norm(dim=0, keepdim=True)
        residual = (rows[:1000] - forward(rows[:1000])[0]).detach()
        means = torch.stack(parts).detach().mean(dim=0).tolist()
        lines.append((*means, float(1 - residual.var() / rows[:1000].var())))
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}), [*lines, b_pre.detach()]


@pytest.mark.parametrize("coefficient", [1e-2, 0.0])
def test_fifty_steps_are_those_of_a_plain_loop(rows: Tensor, coefficient: float, capsys: pytest.CaptureFixture) -> None:
    """900 rows by 90 are ten steps an epoch, so five epochs are fifty."""
    sae = train_sae(rows, 24, N_FEATURES, K, 5, 90, 3e-3, coefficient, seed=7)
    plain, [*lines, b_pre] = by_hand(rows, 5, 90, 3e-3, coefficient, 7)
    assert sae.trained["tokens"] == 50 * 90
    for name, weight in (*plain.state_dict().items(), ("b_pre", b_pre)):
        assert float((sae.state_dict()[name] - weight).abs().max()) < 1e-8, name
    pattern = r"epoch +(\d)/5: reconstruction ([\d.]+), sparsity ([\d.]+), FVE (-?[\d.]+)"
    printed = re.findall(pattern, capsys.readouterr().out)
    assert [int(line[0]) for line in printed] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(np.array([line[1:] for line in printed], float), np.array(lines), atol=1e-4)
    assert lines[-1][0] < 0.8 * lines[0][0]


def test_a_batch_that_is_left_over_is_trained_on(rows: Tensor) -> None:
    sae = train_sae(rows[:100], 24, N_FEATURES, K, 1, 64, seed=7)
    plain, _ = by_hand(rows[:100], 1, 64, 3e-4, 1e-3, 7)
    torch.testing.assert_close(sae.encoder.weight, plain["encoder"].weight)
    assert sae.trained["tokens"] == 100


def test_columns_are_unit_vectors_after_training(sae: SparseAutoencoder) -> None:
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(N_FEATURES))


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda x: x, {}, r"have 24 values a row, d_model is 768; pass d_model=24"),
        (lambda x: x[0], {"d_model": 24}, r"shape \(24,\)"),
        (lambda x: x[:0], {"d_model": 24}, "at least one row"),
        (lambda x: x / 0, {"d_model": 24}, "NaN or infinite"),
        (lambda x: x, {"d_model": 24, "num_epochs": 0}, "num_epochs 0"),
        (lambda x: x, {"d_model": 24, "lr": float("nan")}, "lr nan"),
    ],
)
def test_what_cannot_be_trained_on_is_said(change: Any, options: dict[str, Any], expected: str, rows: Tensor) -> None:
    with pytest.raises(InputError, match=expected):
        train_sae(change(rows), **options)


# Looking


def test_inspected_are_the_features_of_highest_mean(
    collected: Collected, sae: SparseAutoencoder, capsys: pytest.CaptureFixture
) -> None:
    x, tokenizer, model = collected
    found = lesson.inspect_features(sae, x, tokenizer, model, TEXTS, LAYER, top_n=3)
    printed = capsys.readouterr().out
    ids = [tokenizer.encode(text) for text in TEXTS]
    tokens = [tokenizer.decode([i]) for text in ids for i in text]
    codes = dense_codes(sae, torch.cat([lesson._rows(model, LAYER, text) for text in ids]))
    order = np.argsort(-codes.mean(axis=0), kind="stable")[:20].tolist()
    assert list(found) == order
    for feature, firings in found.items():
        best = [row for row in np.argsort(-codes[:, feature], kind="stable")[:3] if codes[row, feature] > 0]
        np.testing.assert_allclose([value for _, value in firings], codes[best, feature], rtol=1e-4)
        assert all(np.isclose(codes[:, feature][np.array(tokens) == token], value).any() for token, value in firings)
    rate = (dense_codes(sae, x) > 0).mean(axis=0)
    assert f"feature {order[0]:>5}  mean {codes[:, order[0]].mean():>7.3f}  fires on {rate[order[0]]:>6.1%}" in printed
    assert lesson.inspect_features(sae.to_sae(), None, tokenizer, model, TEXTS, LAYER, 3).keys() == found.keys()


def test_statistics_are_those_of_dense_codes(
    collected: Collected, sae: SparseAutoencoder, capsys: pytest.CaptureFixture
) -> None:
    x = collected.activations
    found = lesson.analyze_feature_statistics(sae, x, top_n=12)
    printed = capsys.readouterr().out
    fired = dense_codes(sae, x) > 0
    rate = fired.mean(axis=0)
    np.testing.assert_allclose(found.frequency, rate)
    dead = int((rate == 0).sum())
    assert dead > 0
    assert found.bands == {
        "always": int((rate > 0.9).sum()),
        "common": int(((rate > 0.1) & (rate <= 0.9)).sum()),
        "rare": int(((rate > 0.01) & (rate <= 0.1)).sum()),
        "very rare": int(((rate > 0) & (rate <= 0.01)).sum()),
        "dead": dead,
    }
    assert f"the textbook's very rare: {int((rate <= 0.01).sum())}" in printed
    assert found.top == np.argsort(-rate, kind="stable")[:12].tolist()
    chosen = fired[:, found.top].astype(float)
    np.testing.assert_allclose(found.joint, chosen.T @ chosen / len(x))
    pairs = [found.joint[i, j] for i in range(12) for j in range(i)]
    shown = re.findall(r"and +\d+ +([\d.]+)%", printed)
    np.testing.assert_allclose(np.array(shown, float), 100 * np.sort(pairs)[::-1][:10], atol=0.006)


def test_the_pipeline_is_the_three_in_a_row(model_folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"n_features": N_FEATURES, "k": K, "num_samples": 4, "max_len": 12, "num_epochs": 2}
    found = lesson.run_sae_pipeline(str(model_folder), LAYER, corpus=TEXTS, sentences=TEXTS[:2], **options)
    assert isinstance(found.sae, SparseAutoencoder)
    lines = capsys.readouterr().out.splitlines()
    assert [sum(line.startswith(word) for line in lines) for word in ("epoch", "feature")] == [2, 20]
    again = train_sae(found.activations, 32, N_FEATURES, K, num_epochs=2, sparsity_coeff=5e-4)
    assert torch.equal(again.encoder.weight, found.sae.encoder.weight)


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        ([], {}, "need at least 1"),
        ([""], {}, "need at least 1"),
        (["a"], {"top_n": 0}, "top_n is 0"),
        (["a " * 200], {}, r"tokens, the model has 64 positions"),
        (["a"], {"layer": 3}, "has 3 blocks"),
    ],
)
def test_texts_that_cannot_be_inspected_are_refused(
    written: list[str], options: dict[str, int], expected: str, collected: Collected, sae: SparseAutoencoder
) -> None:
    with pytest.raises(InputError, match=expected):
        lesson.inspect_features(sae, None, *collected[1:], written, **{"layer": LAYER, **options})


def test_a_model_in_training_mode_is_refused(model_folder: Path, collected: Collected, sae: SparseAutoencoder) -> None:
    model = GPT2LMHeadModel.from_pretrained(model_folder).train()
    with pytest.raises(InputError, match=r"call model\.eval"):
        lesson.inspect_features(sae, None, collected.tokenizer, model, TEXTS, LAYER)


# Experiments


@pytest.fixture(scope="module")
def model(collected: Collected) -> nn.Module:
    """The same model without outliers, and weights so large that what its blocks write decides its predictions."""
    lively = copy.deepcopy(collected.model)
    lively.transformer.h[0].mlp.c_proj.bias.data.zero_()
    for parameter in lively.transformer.h.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    return lively


@pytest.fixture(scope="module")
def ids(collected: Collected) -> Tensor:
    return torch.tensor([collected.tokenizer.encode("The fox 7 went to the")])


def outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """(position, d_model) that each attention and MLP adds to the stream, by transformers' own hooks; and the stream."""
    found: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(model.transformer.h):
        for name, module in ((f"attn_{i}", block.attn), (f"mlp_{i}", block.mlp)):

            def keep(_m: nn.Module, _i: Any, out: Any, name: str = name) -> None:
                found[name] = (out[0] if isinstance(out, tuple) else out)[0].detach()

            handles.append(module.register_forward_hook(keep))
    handles.append(model.transformer.ln_f.register_forward_pre_hook(lambda _m, args: found.update(end=args[0][0].detach())))
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_attribution_is_each_outputs_share_of_the_logit(
    model: nn.Module, ids: Tensor, capsys: pytest.CaptureFixture
) -> None:
    target = 17
    found = lesson.direct_logit_attribution(model, ids, target)
    printed = capsys.readouterr().out
    parts = outputs(model, ids)
    end, norm, direction = parts.pop("end")[-1].double(), model.transformer.ln_f, model.lm_head.weight[target].double()
    sigma = (end.var(correction=0) + norm.eps).sqrt()
    expected = {
        name: float((part[-1].double() - part[-1].double().mean()) / sigma * norm.weight.double() @ direction)
        for name, part in parts.items()
    }
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert list(found) == sorted(expected, key=lambda name: -expected[name])
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines[1:-1]] == list(found), "printed in the same order"
    assert float(lines[-1][-1]) == pytest.approx(float(model(ids).logits[0, -1, target]), abs=2e-3), "all parts: the logit"


def test_the_textbooks_form_leaves_the_final_norm_out(model: nn.Module, ids: Tensor) -> None:
    found = lesson.direct_logit_attribution(model, ids, 17, final_norm=False)
    parts = outputs(model, ids)
    expected = {name: float(part[-1] @ model.lm_head.weight[17]) for name, part in parts.items() if name != "end"}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert found != pytest.approx(lesson.direct_logit_attribution(model, ids, 17), rel=0.1)


@pytest.mark.parametrize("component", ["attn", "mlp"])
def test_patched_is_the_corrupt_run_with_the_clean_runs_output(model: nn.Module, ids: Tensor, component: str) -> None:
    corrupt = ids.clone()
    corrupt[0, 1:3] += 5
    found = lesson.activation_patching(model, {"input_ids": ids}, corrupt, component, 1)
    clean = outputs(model, ids)[f"{component}_1"]
    module = getattr(model.transformer.h[1], component)

    def replace(_m: nn.Module, _i: Any, out: Any) -> Any:
        return (clean[None], *out[1:]) if isinstance(out, tuple) else clean[None]

    handle = module.register_forward_hook(replace)
    patched = model(corrupt).logits[0, -1]
    handle.remove()
    expected = {"clean_logits": model(ids), "corrupt_logits": model(corrupt)}
    for name, out in expected.items():
        torch.testing.assert_close(found[name], out.logits[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["patched_logits"], patched, rtol=1e-4, atol=1e-4)
    assert float((patched - found["corrupt_logits"]).abs().max()) > 1e-3, "the patch does something"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ablated_is_the_reconstruction_without_the_feature(
    collected: Collected, model: nn.Module, sae: SparseAutoencoder, capsys: pytest.CaptureFixture
) -> None:
    tokenizer, text = collected.tokenizer, TEXTS[0]
    ids = torch.tensor([tokenizer.encode(text)])
    codes, _ = sae.encode(lesson._rows(model, 1, ids[0].tolist()).clone())
    feature = int(codes[-1].argmax())

    def next_token(stream: Tensor | None) -> Tensor:
        if stream is None:
            return model(ids).logits[0, -1].double().log_softmax(-1)
        handle = model.transformer.h[1].register_forward_hook(
            lambda _m, _i, out: (stream[None], *out[1:]) if isinstance(out, tuple) else stream[None]
        )
        found = model(ids).logits[0, -1].double().log_softmax(-1)
        handle.remove()
        return found

    without = codes.clone()
    without[:, feature] = 0
    with torch.no_grad():
        normal, rebuilt, ablated = next_token(None), next_token(sae.decode(codes)), next_token(sae.decode(without))
        kept = next_token(lesson._rows(model, 1, ids[0].tolist()) + sae.decode(without) - sae.decode(codes))

    def divergence(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum())

    found = lesson.ablate_feature(model, sae, tokenizer, text, feature, layer=1)
    assert f"KL(normal ‖ ablated) {found.kl:.4f}" in capsys.readouterr().out
    assert found.kl > 1e-4, "the feature does something"
    got = (found.kl, found.kl_reconstruction, found.kl_feature)
    expected = divergence(normal, ablated), divergence(normal, rebuilt), divergence(rebuilt, ablated)
    assert got == pytest.approx(expected, rel=1e-2, abs=1e-6)
    for tokens, logs in ((found.normal, normal), (found.ablated, ablated)):
        top = logs.exp().topk(5)
        assert [token for token, _ in tokens] == [tokenizer.decode([i]) for i in top.indices.tolist()]
        np.testing.assert_allclose([p for _, p in tokens], top.values.numpy(), rtol=1e-3)
    only = lesson.ablate_feature(model, sae, tokenizer, text, feature, layer=1, keep_error=True)
    assert (only.kl, only.kl_reconstruction) == (pytest.approx(divergence(normal, kept), rel=1e-2, abs=1e-6), None)


def test_a_feature_that_does_not_fire_changes_nothing(collected: Collected, sae: SparseAutoencoder) -> None:
    _, tokenizer, model = collected
    codes, _ = sae.encode(lesson._rows(model, 1, tokenizer.encode(TEXTS[0])).clone())
    silent = int((codes.sum(dim=0) == 0).nonzero()[0, 0])
    found = lesson.ablate_feature(model, sae, tokenizer, TEXTS[0], silent, layer=1, keep_error=True)
    assert (found.kl, found.ablated) == (0.0, found.normal)
    assert lesson.ablate_feature(model, sae, tokenizer, TEXTS[0], silent, layer=1).kl_feature == 0.0


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (lambda m, s, t, i: lesson.direct_logit_attribution(m, i, 4000), "token 4000: the model's vocabulary has"),
        (lambda m, s, t, i: lesson.direct_logit_attribution(m, i[:, :0], 1), r"shape \(1, 0\)|shape \(0,\)"),
        (lambda m, s, t, i: lesson.direct_logit_attribution(m, i.repeat(1, 20), 1), "the model has 64 positions"),
        (lambda m, s, t, i: lesson.direct_logit_attribution(m, i + 100_000, 1), "token 100"),
        (lambda m, s, t, i: lesson.direct_logit_attribution(nn.Linear(1, 1), i, 1), "is a Linear"),
        (lambda m, s, t, i: lesson.activation_patching(m, i, i, "head", 0), "component_name 'head'"),
        (lambda m, s, t, i: lesson.activation_patching(m, i, i, "mlp", 6), "layer 6: the model has 3 blocks"),
        (lambda m, s, t, i: lesson.activation_patching(m, i, i[:, 1:], "mlp", 0), "positions cannot be compared"),
        (lambda m, s, t, i: lesson.ablate_feature(m, s, t, "a mole", 48, 1), "feature 48: the SAE has 48 features"),
        (lambda m, s, t, i: lesson.ablate_feature(m, s, t, "a mole", 1), "layer 6: the model has 3 blocks"),
        (lambda m, s, t, i: lesson.ablate_feature(m, s, t, "", 1, 1), "has no token"),
        (
            lambda m, s, t, i: lesson.ablate_feature(m, SparseAutoencoder(8, 9, 2), t, "a mole", 1, 1),
            "d_model 8, the model 32",
        ),
    ],
)
def test_an_experiment_that_cannot_be_made_is_refused(
    experiment: Any, expected: str, collected: Collected, sae: SparseAutoencoder, ids: Tensor
) -> None:
    with pytest.raises(InputError, match=expected):
        experiment(collected.model, sae, collected.tokenizer, ids)


# Onwards


def test_a_saved_sae_goes_on_to_the_stages(
    collected: Collected, sae: SparseAutoencoder, store: Path, tmp_path: Path, client: Any
) -> None:
    from pipelines.codes.stage import EncodeConfig, encode
    from pipelines.sae.checkpoint import load_run

    record = lesson.save_as_run(sae, tmp_path / "run", store, collected.model, LAYER)
    loaded, again = load_run(tmp_path / "run")
    assert (again, again.config["recipe"], again.rows_seen) == (record, "textbook", sae.trained["tokens"])
    torch.testing.assert_close(loaded.encode(collected.activations), sae.to_sae().encode(collected.activations))
    encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    assert (tmp_path / "codes" / "manifest.json").exists()


def test_an_sae_of_another_model_or_never_trained_is_not_saved(
    collected: Collected, sae: SparseAutoencoder, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not made by train_sae"):
        lesson.save_as_run(SparseAutoencoder(32, 48, 4), tmp_path / "run", store, collected.model, LAYER)
    other = GPT2LMHeadModel(collected.model.config)
    with pytest.raises(IdentityMismatch, match="pass a store of the same model"):
        lesson.save_as_run(sae, tmp_path / "run", store, other, LAYER)
    assert not (tmp_path / "run").exists()
