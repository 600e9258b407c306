"""What the sparse autoencoder computes: the codes of its definition, and the gradients of the dense form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from actstore.errors import InputError
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.geometric_median import geometric_median

D_MODEL, N_FEATURES, N_ROWS = 12, 40, 64


def random_sae(k: int, dtype: torch.dtype, b_enc: float = 0.0) -> tuple[TopKSae, Tensor]:
    """An SAE none of whose parameters is at its start, and rows for it."""
    generator = torch.Generator().manual_seed(3)
    sae = TopKSae(D_MODEL, N_FEATURES, k).to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        sae.b_enc += b_enc
    return sae, 2 * torch.randn(N_ROWS, D_MODEL, generator=generator, dtype=dtype)


def dense_forward(sae: TopKSae, x: Tensor) -> tuple[Tensor, Tensor]:
    """(reconstruction, codes (n, F)) by the definition, in operators that autograd knows."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    top = torch.topk(pre, sae.k, dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return codes @ sae.W_dec + sae.b_dec, codes


def dense_codes(values: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(len(values), N_FEATURES, dtype=values.dtype).scatter(1, indices, values)


def gradients(sae: TopKSae, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("b_enc", [0.0, -4.5], ids=["full", "fewer-than-k-positive"])
@pytest.mark.parametrize("k", [1, 5, N_FEATURES])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_of_every_parameter_are_those_of_the_dense_form(
    k: int, b_enc: float, dtype: torch.dtype, tolerance: float
) -> None:
    sae, x = random_sae(k, dtype, b_enc)
    weight = torch.linspace(0.5, 2, N_ROWS, dtype=dtype)[:, None]
    reconstruction, values, indices = sae(x)
    found = gradients(sae, (weight * (reconstruction - x).square()).sum() + 0.1 * values.sum())
    reference, codes = dense_forward(sae, x)
    expected = gradients(sae, (weight * (reference - x).square()).sum() + 0.1 * codes.sum())
    if b_enc:
        assert int((values > 0).sum(dim=1).min()) < k
    assert found.keys() == expected.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert float((reconstruction - reference).detach().abs().max()) <= tolerance * float(reference.detach().abs().max())
    torch.testing.assert_close(dense_codes(values, indices), codes, rtol=tolerance, atol=tolerance)
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) <= tolerance * float(expected[name].abs().max()), name


def test_codes_are_the_k_largest_by_rising_index_and_never_negative() -> None:
    sae, x = random_sae(6, torch.float64, -1.0)
    values, indices = sae.encode(x)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach().numpy()
    for row in range(N_ROWS):
        chosen = sorted(np.argsort(-pre[row])[:6].tolist())
        assert indices[row].tolist() == chosen
        np.testing.assert_allclose(values[row].detach(), np.maximum(pre[row, chosen], 0), rtol=1e-13)


@pytest.mark.parametrize("k", [0, 9])
def test_k_outside_one_to_n_features_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"k {k}: the SAE has 8 features; choose --k between 1 and 8"):
        TopKSae(4, 8, k)


def test_an_sae_starts_tied_with_unit_directions_that_its_seed_decides() -> None:
    sae, same, other = TopKSae(8, 16, 2, seed=1), TopKSae(8, 16, 2, seed=1), TopKSae(8, 16, 2, seed=2)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert torch.equal(sae.W_dec, same.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_folding_the_input_scale_gives_the_same_sae_of_raw_rows() -> None:
    sae, x = random_sae(5, torch.float64)
    scale = 0.037
    reconstruction, values, indices = sae(x * scale)
    sae.fold_input_scale(scale)
    raw_reconstruction, raw_values, raw_indices = sae(x)
    assert torch.equal(raw_indices, indices)
    torch.testing.assert_close(raw_values * scale, values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(raw_reconstruction * scale, reconstruction, rtol=1e-12, atol=1e-14)


def test_the_projected_decoder_gradient_is_orthogonal_to_unit_rows() -> None:
    sae, x = random_sae(5, torch.float64)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES, dtype=torch.float64), rtol=1e-14, atol=0)
    before = gradients(sae, (sae(x)[0] - x).square().sum())["W_dec"]
    sae.project_decoder_gradient()
    assert sae.W_dec.grad is not None
    along = (sae.W_dec.grad * sae.W_dec.detach()).sum(dim=1)
    assert float(along.abs().max()) < 1e-12 * float(before.abs().max())
    torch.testing.assert_close(before - sae.W_dec.grad, (before * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec)


def test_a_zero_decoder_row_stays_finite() -> None:
    sae = TopKSae(4, 8, 2)
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalise_decoder()
    assert bool(sae.W_dec.isfinite().all())


# The geometric median


def sum_of_distances(point: np.ndarray, rows: np.ndarray) -> float:
    return float(np.linalg.norm(rows - point, axis=1).sum())


def test_the_geometric_median_is_where_a_general_minimiser_finds_it() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3)) * [1.0, 5.0, 0.2] + [3.0, -1.0, 10.0]
    reference = minimize(sum_of_distances, rows.mean(axis=0), args=(rows,), method="Nelder-Mead", options={"xatol": 1e-9})
    found = geometric_median(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, reference.x, atol=1e-5)
    assert sum_of_distances(found, rows) <= reference.fun * (1 + 1e-9)


def test_five_per_cent_of_huge_rows_move_the_geometric_median_by_less_than_one_per_cent() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2000, 32, generator=generator) + 5
    outliers = 3000 * torch.randn(100, 32, generator=generator)
    there = geometric_median(clean)
    moved = geometric_median(torch.cat([clean, outliers]))
    assert float((moved - there).norm()) < 0.01 * float(there.norm())
    assert float((torch.cat([clean, outliers]).mean(dim=0) - there).norm()) > 0.5 * float(there.norm())


def test_on_a_line_the_geometric_median_is_the_median() -> None:
    along = torch.tensor([0.0, 1.0, 2.5, 7.0, 100.0, 3.0, 2.0], dtype=torch.float64)
    direction = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    found = geometric_median(along[:, None] * direction, iterations=1000)
    torch.testing.assert_close(found, 2.5 * direction, rtol=1e-4, atol=1e-4)


def test_a_row_at_the_mean_does_not_hold_the_geometric_median_there() -> None:
    rows = torch.tensor([[0.0], [0.0], [0.0], [2.0], [8.0]])
    torch.testing.assert_close(geometric_median(rows), torch.tensor([0.0]), rtol=0, atol=1e-4)


def test_equal_rows_are_their_own_geometric_median() -> None:
    rows = torch.tensor([[3.0, -4.0]]).expand(10, 2)
    assert torch.equal(geometric_median(rows), rows[0])
