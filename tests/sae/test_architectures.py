"""What every architecture computes: its codes, the gradients of its definition, and that it learns."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from actstore.errors import InputError
from pipelines.sae.active_features import batch_top_k
from pipelines.sae.architectures import jumprelu
from pipelines.sae.architectures.batchtopk import BatchTopKSae
from pipelines.sae.architectures.gated import GatedSae
from pipelines.sae.architectures.jumprelu import JumpReluSae
from pipelines.sae.architectures.matryoshka import MatryoshkaSae
from pipelines.sae.architectures.registry import architectures, make
from pipelines.sae.base import Objective, Sae
from pipelines.sae.kernels import KERNELS
from pipelines.sae.sparse_operators import Active

D_MODEL, N_FEATURES, K, N_ROWS = 12, 48, 5, 64
NAMES = sorted(architectures())
PRECISION = {torch.float64: 1e-11, torch.float32: 3e-5}


def random_sae(name: str, dtype: torch.dtype) -> tuple[Sae, Tensor]:
    """An SAE none of whose parameters is at its start, and rows for it."""
    generator = torch.Generator().manual_seed(3)
    sae = make(name, D_MODEL, N_FEATURES, K).to(dtype)
    x = 2 * torch.randn(N_ROWS, D_MODEL, generator=generator, dtype=dtype)
    sae.start(x)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    sae.after_step(sae.training_codes(x[: N_ROWS // 2], "dense"))
    sae.after_step(sae.training_codes(x[N_ROWS // 2 :], "dense"))
    return sae, x


def dense_codes(sae: Sae, values: Tensor, indices: Tensor) -> Tensor:
    return values.new_zeros(len(values), sae.n_features).scatter_add(1, indices, values)


def structured_rows(n_rows: int, d_model: int, n_directions: int, per_row: float = 3.0, seed: int = 0) -> Tensor:
    """Sums of a few of many directions, some of them far more frequent, scaled as the trainer does."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, d_model, generator=torch.Generator().manual_seed(99))
    directions /= directions.norm(dim=1, keepdim=True)
    rates = torch.arange(1, n_directions + 1) ** -0.5
    present = torch.rand(n_rows, n_directions, generator=generator) < (per_row * rates / rates.sum()).clamp_max(0.5)
    x = (present * (0.5 + torch.rand(n_rows, n_directions, generator=generator))) @ directions
    return x / x.var(dim=0).mean().sqrt()


# The definitions, in operators that autograd knows


def heaviside(z: Tensor, threshold: Tensor, width: float) -> Tensor:
    """1 above the threshold, with the slope of a ramp as wide as the window: the estimator in closed form."""
    ramp = ((z.detach() - threshold) / width).clamp(-0.5, 0.5)
    return (z > threshold).to(z.dtype) + ramp - ramp.detach()


def defined_losses(sae: Sae, x: Tensor, objective: Objective) -> dict[str, Tensor]:
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if isinstance(sae, GatedSae):
        pre = (x - sae.b_dec) @ sae.W_enc.T
        gate = (pre + sae.b_gate).relu()
        codes = (gate > 0) * (pre * sae.r_mag.exp() + sae.b_enc).relu()
        of_gate = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        return {
            "mse": (codes @ sae.W_dec + sae.b_dec - x).square().mean(),
            "l1": objective.l1 * gate.mean(),
            "gate": (of_gate - x).square().mean(),
        }
    if isinstance(sae, JumpReluSae):
        threshold, width = sae.log_threshold.exp(), jumprelu.BANDWIDTH
        # d(z · H)/dθ is −θ · δ(z − θ): the ramp is multiplied by θ, not by z
        step = heaviside(pre, threshold, width)
        codes = pre * (pre > threshold) + threshold.detach() * (step - step.detach())
        return {
            "mse": (codes @ sae.W_dec + sae.b_dec - x).square().mean(),
            "l0": jumprelu.COEFFICIENT * (step.sum(dim=1).mean() / sae.k - 1).square(),
            "l1": objective.l1 * codes.mean(),
        }
    if isinstance(sae, BatchTopKSae):
        smallest = pre.flatten().sort(descending=True).values[sae.k * len(x) - 1]
        codes = pre.relu() * (pre >= smallest)
    elif sae.architecture == "topk":
        codes = pre.relu() * (pre >= pre.sort(dim=1, descending=True).values[:, sae.k - 1 : sae.k])
    else:
        codes = pre.relu()
    ends = [3, 6, 12, 24, 48] if isinstance(sae, MatryoshkaSae) else [N_FEATURES]
    errors = [(codes[:, :end] @ sae.W_dec[:end] + sae.b_dec - x).square().mean() for end in ends]
    return {"mse": torch.stack(errors).mean(), "l1": objective.l1 * codes.mean()}


def gradients(sae: Sae, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: cast(Tensor, parameter.grad).clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("kernel", ["sparse-fp32", "dense"])
@pytest.mark.parametrize("dtype", list(PRECISION), ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_definition(name: str, dtype: torch.dtype, kernel: str) -> None:
    sae, x = random_sae(name, dtype)
    objective = Objective(l1=0.7, kernel=kernel)
    losses = sae.losses(x, objective)
    found = gradients(sae, losses.total)
    terms = defined_losses(sae, x, objective)
    expected = gradients(sae, torch.stack(list(terms.values())).sum())
    assert losses.terms.keys() == terms.keys()
    for term, value in terms.items():
        torch.testing.assert_close(losses.terms[term], value, rtol=PRECISION[dtype], atol=0)
    for parameter, gradient in expected.items():
        assert float(gradient.abs().max()) > 0, parameter
        difference = float((found[parameter] - gradient).abs().max())
        assert difference <= PRECISION[dtype] * float(gradient.abs().max()), parameter


def test_a_threshold_has_the_gradient_of_its_estimator() -> None:
    z = torch.tensor([0.7, 0.95, 1.2, 1.4], dtype=torch.float64, requires_grad=True)
    threshold = torch.ones(4, dtype=torch.float64, requires_grad=True)
    values, fires = jumprelu.Jump.apply(z, threshold, 0.5)
    assert values.tolist() == [0, 0, 1.2, 1.4]
    assert fires.tolist() == [0, 0, 1, 1]
    (values * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward(retain_graph=True)
    assert cast(Tensor, z.grad).tolist() == [0, 0, 3, 4]
    assert cast(Tensor, threshold.grad).tolist() == [0, -2 / 0.5, -3 / 0.5, 0]
    threshold.grad = None
    fires.sum().backward()
    assert cast(Tensor, threshold.grad).tolist() == [0, -1 / 0.5, -1 / 0.5, 0]


# Every architecture


def trained(sae: Sae, rows: Tensor, n_steps: int, *, lr: float = 4e-3, kernel: str = "sparse") -> Sae:
    sae.b_dec.data = rows.mean(dim=0)
    sae.start(rows)
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (n_steps - step) / (n_steps / 3)))
    objective = Objective(l1=sae.default_l1, kernel=kernel)
    for batch in torch.arange(n_steps * 256).view(n_steps, 256) % len(rows):
        losses = sae.losses(rows[batch], objective)
        optimiser.zero_grad()
        losses.total.backward()
        sae.project_decoder_gradient()
        optimiser.step()
        schedule.step()
        sae.normalise_decoder()
        sae.after_step(losses.codes)
    return sae


@torch.no_grad()
def explained_and_l0(sae: Sae, rows: Tensor) -> tuple[float, float]:
    codes = sae.codes(rows)
    unexplained = (sae.reconstruct(codes) - rows).square().sum() / (rows - rows.mean(dim=0)).square().sum()
    return 1 - float(unexplained), float((codes.values > 0).sum()) / len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_each_learns_with_about_k_codes_a_row(name: str) -> None:
    rows = structured_rows(12_288, 32, 96)
    sae = trained(make(name, 32, 128, 4), rows[:8192], 150, lr=8e-3)
    explained, l0 = explained_and_l0(sae, rows[8192:])
    print(f"{name}: FVE {explained:.3f}, L0 {l0:.2f}")
    assert explained > 0.7
    aimed = {"topk": 1.001, "batchtopk": 1.05, "matryoshka": 1.05, "jumprelu": 1.1}.get(name, 3.0)
    assert 4 / aimed < l0 < 4 * aimed


@pytest.mark.parametrize("name", NAMES)
def test_folding_the_input_scale_gives_the_same_sae_of_raw_rows(name: str) -> None:
    sae, x = random_sae(name, torch.float64)
    scale = 0.037
    reconstruction, values, indices = sae(x)
    assert bool(values.any())
    sae.fold_input_scale(scale)
    raw_reconstruction, raw_values, raw_indices = sae(x / scale)
    assert torch.equal(raw_indices, indices)
    torch.testing.assert_close(raw_values * scale, values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(raw_reconstruction * scale, reconstruction, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_encode_pads_with_zeros_and_keeps_the_largest(name: str) -> None:
    sae, x = random_sae(name, torch.float64)
    values, indices = sae.encode(x)
    codes = sae.codes(x)
    whole = dense_codes(sae, values, indices)
    torch.testing.assert_close(sae.decode(values, indices), sae.reconstruct(codes))
    wide_values, wide_indices = sae.encode(x, N_FEATURES)
    assert wide_values.shape == wide_indices.shape == (N_ROWS, N_FEATURES)
    torch.testing.assert_close(dense_codes(sae, wide_values, wide_indices), whole)
    narrow_values, narrow_indices = sae.encode(x, 2)
    torch.testing.assert_close(narrow_values.sort(dim=1).values, whole.topk(2, dim=1).values.sort(dim=1).values)
    torch.testing.assert_close(narrow_values, whole.gather(1, narrow_indices))


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_a_row_do_not_depend_on_the_rows_beside_it(name: str) -> None:
    sae, x = random_sae(name, torch.float64)
    values, indices = sae.encode(x, N_FEATURES)
    few = sae.encode(x[7:9], N_FEATURES)
    torch.testing.assert_close(dense_codes(sae, *few), dense_codes(sae, values, indices)[7:9])


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_rows_without_a_code_are_no_special_case(name: str) -> None:
    sae, x = random_sae(name, torch.float32)
    assert sae.encode(x[:0])[0].numel() == 0
    assert sae(x[:0])[0].shape == (0, D_MODEL)
    reconstruction, values, _ = sae(sae.b_dec.detach().expand(3, -1) - 100 * sae.W_enc.detach().mean(dim=0))
    if not values.any():
        torch.testing.assert_close(reconstruction, sae.b_dec.expand(3, -1))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_agree(name: str) -> None:
    sae = make(name, 32, 256, 8)
    x = structured_rows(512, 32, 64)
    sae.start(structured_rows(512, 32, 64, seed=1))  # of other rows, of which none lies at a starting threshold
    found = {kernel: sae.losses(x, Objective(l1=0.1, kernel=kernel)) for kernel in KERNELS}
    for kernel, losses in found.items():
        tolerance = 2e-3 if kernel == "sparse" else 1e-5  # a code within bfloat16's rounding of the last may be another
        torch.testing.assert_close(losses.total, found["dense"].total, rtol=tolerance, atol=0)
        codes = dense_codes(sae, *losses.codes.padded(256))
        same = (codes - dense_codes(sae, *found["dense"].codes.padded(256))).abs().amax(dim=1) < 1e-4
        assert float(same.float().mean()) > (0.98 if kernel == "sparse" else 0.999)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_the_state_dict_as_if_nothing_had_happened(name: str) -> None:
    rows = structured_rows(2048, 16, 32)
    once = trained(make(name, 16, 32, 4), rows, 5)
    again = make(name, 16, 32, 4, seed=7)
    again.load_state_dict({key: value.clone() for key, value in once.state_dict().items()})
    for sae in (once, again):
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for _ in range(3):
            losses = sae.losses(rows[:256], Objective(l1=sae.default_l1))
            optimiser.zero_grad()
            losses.total.backward()
            optimiser.step()
            sae.after_step(losses.codes)
    for key, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


# The registry


def test_each_architecture_is_named_in_its_own_file_only() -> None:
    assert {"topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"} <= set(NAMES)
    for name, architecture in architectures().items():
        assert architecture.architecture == name
        assert Path(inspect.getfile(architecture)).stem == name


def test_an_unknown_architecture_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(
        InputError, match=r"architecture 'topk2': there is none of that name; choose one of batchtopk, gated"
    ):
        make("topk2", 4, 8, 2)


# BatchTopK


def test_the_threshold_is_the_mean_of_the_batches_smallest_codes_from_the_first_batch_on() -> None:
    sae = cast(BatchTopKSae, make("batchtopk", D_MODEL, N_FEATURES, K))
    generator = torch.Generator().manual_seed(0)
    seen, weights = [], []
    for _ in range(30):
        codes = sae.training_codes(torch.randn(32, D_MODEL, generator=generator), "dense")
        sae.after_step(codes)
        seen.append(float(codes.values.detach().min()))
        weights = [0.95 * weight for weight in weights] + [0.05]
        expected = sum(w * v for w, v in zip(weights, seen, strict=True)) / sum(weights)
        assert math.isclose(float(sae.threshold), expected, rel_tol=1e-6)
    assert int(sae.n_batches) == 30


def test_a_batch_without_a_code_leaves_the_threshold() -> None:
    sae = cast(BatchTopKSae, make("batchtopk", D_MODEL, N_FEATURES, K))
    sae.after_step(sae.training_codes(torch.zeros(4, D_MODEL), "dense"))
    assert float(sae.threshold) == 0
    assert int(sae.n_batches) == 0


@pytest.mark.parametrize("huge", [1.0, 50.0], ids=["alike", "one-row-takes-most"])
def test_a_batch_is_searched_until_no_row_could_hold_more(huge: float) -> None:
    x = structured_rows(700, 32, 96)
    x[5] *= huge
    weight = torch.randn(1024, 32, generator=torch.Generator().manual_seed(1))
    bias = torch.full((1024,), -0.1)
    exact, values = batch_top_k(x, weight, bias, 4, fast=False)
    pre = x @ weight.T + bias
    expected = pre.flatten().topk(2800).indices.sort().values
    assert torch.equal(exact.rows * 1024 + exact.features, expected)
    torch.testing.assert_close(values, pre.flatten()[expected], rtol=1e-5, atol=1e-5)
    if huge > 1:
        assert int(exact.counts.max()) > 4 * 4
    fast, fast_values = batch_top_k(x, weight, bias, 4, fast=True)
    torch.testing.assert_close(fast_values.sum(), values.sum(), rtol=1e-5, atol=0)
    assert agreement(fast, exact) >= 0.999


def agreement(found: Active, expected: Active) -> float:
    """The share of rows with the same features."""
    masks = [
        torch.zeros(a.n_rows, a.n_features, dtype=torch.bool).index_put((a.rows, a.features), torch.tensor(True))
        for a in (found, expected)
    ]
    return float((masks[0] == masks[1]).all(dim=1).float().mean())


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_bfloat16_search_finds_what_the_full_one_finds(name: str) -> None:
    rows = structured_rows(10_240, 64, 256, per_row=8.0)
    sae = trained(make(name, 64, 512, 8), rows[:6144], 24)
    found = [sae.training_codes(rows[6144:], kernel).active for kernel in ("sparse", "sparse-fp32")]
    assert agreement(found[0], found[1]) >= 0.999
