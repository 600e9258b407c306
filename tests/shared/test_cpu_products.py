"""Dense layers are computed by oneDNN where nothing is differentiated, and nothing else about a model changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines.compute import cpu_products as products
from pipelines.compute.cpu_products import has_onednn, product, speed_up

SHAPES = (((5, 7), 3), ((2, 130, 192), 768), ((1, 1, 768), 50), ((300, 3072), 768), ((0, 8), 4))


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(shape: tuple[int, ...], n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (n_out, shape[-1]), (n_out,))
    x, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    return x, weight, bias


def tiny_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=16)).eval()


@pytest.mark.parametrize(("shape", "n_out"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_a_product_is_that_of_float64_to_float32_rounding(shape: tuple[int, ...], n_out: int, with_bias: bool) -> None:
    x, weight, bias = drawn(shape, n_out)
    exact = linear(x.double(), weight.double(), bias.double() if with_bias else None)
    for stored in (weight, weight.T.contiguous().T):
        found = product(x, stored, bias if with_bias else None)
        assert found.shape == exact.shape
        assert found.dtype == torch.float32
        assert float((found - exact).norm()) <= 2e-6 * float(exact.norm())


@torch.no_grad()
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    for shape, n_out in (((2, 130, 192), 768), ((3, 3072), 768)):
        x, weight, bias = drawn(shape, n_out)
        with threads(1):
            one = product(x, weight, bias)
        with threads(2):
            assert torch.equal(product(x, weight, bias), one)


def test_what_is_differentiated_has_its_gradient() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in drawn((4, 6), 5))
    product(x, weight, bias).square().sum().backward()
    expected = [own.detach().clone().requires_grad_() for own in (x, weight, bias)]
    linear(*expected).square().sum().backward()
    for own, other in zip((x, weight, bias), expected, strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, other.grad)


@torch.no_grad()
def test_other_types_and_mixed_ones_are_left_to_pytorch() -> None:
    x, weight, bias = drawn((4, 6), 5)
    for dtype in (torch.bfloat16, torch.float64):
        assert product(x.to(dtype), weight.to(dtype), bias.to(dtype)).dtype == dtype


@pytest.mark.skipif(not has_onednn(), reason="PyTorch has no oneDNN here, or uses it by itself")
@torch.no_grad()
def test_a_model_is_computed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    by_onednn = torch.ops.mkldnn._linear_pointwise

    def counted(*arguments: object) -> Tensor:
        nonlocal seen
        seen += 1
        return by_onednn(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    model = tiny_model()
    ids = torch.arange(12)[None]
    model(ids)
    assert seen == 0
    speed_up(model)
    model(ids)
    assert seen == 2 * 4 + 1  # of each block four layers, and the unembedding


def test_a_model_gives_what_it_gave_and_keeps_its_names_weights_and_hooks() -> None:
    model, plain = tiny_model(), tiny_model()
    speed_up(model)
    ids = torch.arange(12)[None]
    seen: list[torch.Size] = []
    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert seen == [(1, 12, 128)]
    for (name, own), (other_name, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(own, other)
    model(ids).logits.square().sum().backward()
    plain(ids).logits.square().sum().backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_copy_computes_with_its_own_weights() -> None:
    model = tiny_model()
    speed_up(model)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in other.modules():
            if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
                layer.weight.data.zero_()
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(other(ids).logits, before)


@torch.no_grad()
def test_where_there_is_no_onednn_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    x, weight, bias = drawn((4, 6), 5)
    assert torch.equal(product(x, weight, bias), linear(x, weight, bias))
