"""The npz format: the same codes to the last bit, the conventions of other tools folded in, hostile files refused."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exchangekit import moved_sae, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from storekit import StoreSpec, write_store

from actstore.errors import InputError
from actstore.files import publish_json
from pipelines.exchange.formats.npz import FORMAT, NEAREST_ULPS, logarithm
from pipelines.sae.checkpoint import load_run

SITE, D_MODEL, N_FEATURES, K = "resid_post.0", 4, 24, 3
FACTS = {"architecture": "jumprelu", "k": K, "site": SITE, "apply_b_dec_to_input": False}
ROWS = 3 * torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, StoreSpec())
    return path


def plain_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays as another tool would write them: decoder rows of any norm."""
    generator = np.random.default_rng(seed)
    shapes = {"W_enc": (D_MODEL, N_FEATURES), "W_dec": (N_FEATURES, D_MODEL), "b_enc": (N_FEATURES,), "b_dec": (D_MODEL,)}
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"threshold": generator.random(N_FEATURES).astype(np.float32)}


def written(folder: Path, arrays: dict[str, Any], facts: Any = FACTS, compressed: bool = False) -> Path:
    """The arrays and the facts as a file of the format, however wrong they are."""
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **arrays)
    publish_json(folder / "params.json", facts)
    return folder / "params.npz"


def dense(arrays: dict[str, np.ndarray], x: np.ndarray, *, subtract: bool) -> np.ndarray:
    """(n, d) reconstructions of a JumpReLU SAE by its definition, in float64."""
    parts = {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = (x - parts["b_dec"] * subtract) @ parts["W_enc"] + parts["b_enc"]
    return np.asarray((pre * (pre > parts["threshold"])) @ parts["W_dec"] + parts["b_dec"])


# There and back


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(FORMAT.architectures),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 37.0]),
)
def test_the_codes_come_back_bit_for_bit(
    architecture: str, seed: int, scale: float, tmp_path_factory: pytest.TempPathFactory, rows_store: Path
) -> None:
    folder = tmp_path_factory.mktemp("both-ways")
    sae = moved_sae(architecture, D_MODEL, N_FEATURES, K, seed)
    sae.fold_input_scale(1 / scale)
    record = write_run(folder / "run", sae, rows_store, SITE)
    FORMAT.write(sae, record, folder / "a.npz")
    back, origin = FORMAT.read(folder / "a.npz")
    assert (origin.site, origin.run_id, origin.code_width) == (SITE, record.run_id, record.code_width)
    assert (origin.model, origin.weights_sha256) == (record.model, record.weights_sha256)
    assert (back.architecture, back.k) == (architecture, K)
    for mine, theirs in zip(sae(ROWS * scale), back(ROWS * scale), strict=True):
        assert torch.equal(mine, theirs)


def test_the_file_is_plain_arrays_and_the_same_each_time(tmp_path: Path, rows_store: Path) -> None:
    sae = moved_sae("batchtopk", D_MODEL, N_FEATURES, K)
    record = write_run(tmp_path / "run", sae, rows_store, SITE)
    for name in ("a.npz", "b.npz"):
        FORMAT.write(sae, record, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
        threshold = arrays["threshold"]
    assert shapes == {
        "W_enc": ((D_MODEL, N_FEATURES), "float32"),
        "W_dec": ((N_FEATURES, D_MODEL), "float32"),
        "b_enc": ((N_FEATURES,), "float32"),
        "b_dec": ((D_MODEL,), "float32"),
        "threshold": ((N_FEATURES,), "float32"),
    }
    assert (threshold == float(sae.get_buffer("threshold"))).all()
    assert json.loads((tmp_path / "a.json").read_text())["apply_b_dec_to_input"] is True


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=40))
def test_a_threshold_that_was_an_exponential_comes_back_exactly(logs: list[float]) -> None:
    threshold = torch.tensor(logs, dtype=torch.float32).exp()
    assert torch.equal(logarithm(threshold).exp(), threshold)
    assert NEAREST_ULPS > 1


def test_a_threshold_of_zero_stays_zero() -> None:
    assert torch.equal(logarithm(torch.tensor([0.0, 1.0])).exp(), torch.tensor([0.0, 1.0]))


# The conventions of other tools


@pytest.mark.parametrize("subtract", [False, True])
def test_other_norms_and_an_unsubtracted_bias_give_the_same_reconstructions(tmp_path: Path, subtract: bool) -> None:
    arrays = plain_arrays()
    path = written(tmp_path, arrays, FACTS | {"apply_b_dec_to_input": subtract})
    sae, origin = FORMAT.read(path)
    assert (origin.run_id, origin.model, origin.code_width) == ("", "", 0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    expected = dense(arrays, ROWS.numpy().astype(np.float64), subtract=subtract)
    np.testing.assert_allclose(sae(ROWS)[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_decoder_row_of_zeros_stays_and_the_others_are_folded(tmp_path: Path) -> None:
    arrays = plain_arrays()
    arrays["W_dec"][3] = 0
    sae, _ = FORMAT.read(written(tmp_path, arrays))
    assert not sae.W_dec[3].any()
    expected = dense(arrays, ROWS.numpy().astype(np.float64), subtract=False)
    np.testing.assert_allclose(sae(ROWS)[0].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_read(tmp_path: Path, dtype: type) -> None:
    arrays = {name: array.astype(dtype) for name, array in plain_arrays().items()}
    sae, _ = FORMAT.read(written(tmp_path, arrays))
    assert sae.W_enc.dtype == torch.float32


def test_norms_are_refused_where_codes_compete(tmp_path: Path) -> None:
    arrays = plain_arrays()
    del arrays["threshold"]
    arrays["W_dec"] *= 2 / np.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)
    with pytest.raises(InputError, match=r"row of W_dec has norm 2, needed is 1: for topk"):
        FORMAT.read(written(tmp_path, arrays, FACTS | {"architecture": "topk"}))


def test_thresholds_that_differ_are_refused_where_there_is_one(tmp_path: Path) -> None:
    arrays = plain_arrays()
    arrays["W_dec"] /= np.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)
    with pytest.raises(InputError, match=r"threshold goes from .* to .*, batchtopk has one for all features"):
        FORMAT.read(written(tmp_path, arrays, FACTS | {"architecture": "batchtopk"}))


# Hostile files


class Planted:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("owned"),)  # type: ignore[return-value]


def spoilt(name: str, array: Any) -> dict[str, Any]:
    return plain_arrays() | {name: array}


INFINITE = plain_arrays()["W_enc"].copy()
INFINITE[1, 2] = np.inf
HUGE = np.full(N_FEATURES, 1e300)
ARRAYS = {
    "pickle": (spoilt("b_enc", np.array([Planted()], dtype=object)), "b_enc is of .*object"),
    "integers": (spoilt("b_enc", np.zeros(N_FEATURES, np.int64)), "b_enc is of 'int64', readable are float16"),
    "complex": (spoilt("b_enc", np.zeros(N_FEATURES, complex)), "b_enc is of 'complex128'"),
    "wide": (
        spoilt("W_enc", np.zeros((D_MODEL + 1, N_FEATURES), np.float32)),
        r"W_dec has shape \(24, 4\).*needed is \(24, 5\)",
    ),
    "flat": (spoilt("W_enc", np.zeros(N_FEATURES, np.float32)), r"W_enc has shape \(24,\)"),
    "empty": (spoilt("W_enc", np.zeros((0, N_FEATURES), np.float32)), r"W_enc has shape \(0, 24\)"),
    "scalar bias": (spoilt("b_dec", np.float32(0)), r"b_dec has shape \(\), .*needed is \(4,\)"),
    "infinite": (spoilt("W_enc", INFINITE), r"W_enc\[1, 2\] is inf, needed are finite"),
    "too large": (spoilt("b_enc", HUGE), r"b_enc\[0\] is 1e\+300, needed are finite numbers of float32"),
    "negative": (spoilt("threshold", np.full(N_FEATURES, -1, np.float32)), r"threshold has -1\.0"),
    "more": (spoilt("b_gate", np.zeros(1)), "holds .*'b_gate'.* needed are W_enc, W_dec, b_enc, b_dec, threshold"),
    "fewer": ({"W_enc": np.zeros((4, 24))}, "holds 'W_enc', needed are W_enc, W_dec"),
    "bomb": (spoilt("W_enc", np.zeros((4000, 8000), np.float32)), r"unfolds to 128,\d+,\d+ bytes, at most"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_none_of_an_sae_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays, message = ARRAYS[name]
    with pytest.raises(InputError, match=message) as refusal:
        FORMAT.read(written(tmp_path, arrays, compressed=name == "bomb"))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    assert not Path("owned").exists()


FACT_FAULTS: dict[str, tuple[Any, str]] = {
    "no object": ([], "holds a list"),
    "no architecture": ({"k": 1}, "architecture is None, needed is of type str"),
    "other architecture": (FACTS | {"architecture": "gated"}, "architecture 'gated'; this format keeps batchtopk"),
    "path": (FACTS | {"architecture": "../../etc"}, r"architecture '\.\./\.\./etc'"),
    "k of text": (FACTS | {"k": "3"}, "k is '3', needed is of type int"),
    "k is true": (FACTS | {"k": True}, "k is True, needed is of type int"),
    "k of none": (FACTS | {"k": 0}, r"k 0, .* has 24 features"),
    "k of many": (FACTS | {"k": 25}, r"k 25, .* has 24 features"),
    "convention": (FACTS | {"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1, needed is of type bool"),
    "version": (FACTS | {"version": 2}, "version 2, readable is 1"),
    "lines": (FACTS | {"architecture": "a\nb" * 1000}, "architecture is 'a"),
    "site of two lines": (FACTS | {"site": "resid\npost"}, r"site is 'resid\\npost', needed is one line"),
}


@pytest.mark.parametrize("name", FACT_FAULTS)
def test_facts_that_are_wrong_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    facts, message = FACT_FAULTS[name]
    with pytest.raises(InputError, match=message) as refusal:
        FORMAT.read(written(tmp_path, plain_arrays(), facts))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"\xff", b" " * (2 << 20)], ids=["cut", "deep", "no text", "long"])
def test_facts_that_are_no_json_are_refused(text: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, plain_arrays())
    (tmp_path / "params.json").write_bytes(text)
    with pytest.raises(InputError, match=r"params\.json: (not readable as JSON|longer than 1,048,576 bytes)"):
        FORMAT.read(path)


def test_a_file_without_its_facts_says_what_they_are(tmp_path: Path) -> None:
    path = written(tmp_path, plain_arrays())
    (tmp_path / "params.json").unlink()
    with pytest.raises(InputError, match=r"params\.json: cannot be read .* architecture, k, site, apply_b_dec_to_input"):
        FORMAT.read(path)


def test_an_array_whose_header_states_more_than_it_has_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, plain_arrays())
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**9)})
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, head.getvalue() if name == "W_enc.npy" else data)
    with pytest.raises(InputError, match=r"W_enc has 128 bytes, its shape \(1000000000, 1000000000\) needs 4,000,000,000"):
        FORMAT.read(path)


@pytest.mark.parametrize("shape", ["-" * 9000 + "1", "(" * 9000, "(4, 24), 'more': 1", "(-4, -24)", "print('owned')"])
def test_a_head_that_is_no_shape_is_refused(shape: str, tmp_path: Path) -> None:
    path = written(tmp_path, plain_arrays())
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, head + bytes(4 * 4 * 24) if name == "W_enc.npy" else data)
    with pytest.raises(
        InputError, match=r"params\.npz: (not an \.npz file of plain arrays|W_enc has shape \(-4, -24\))"
    ) as refusal:
        FORMAT.read(path)
    assert "\n" not in str(refusal.value)


def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, plain_arrays())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as out:
        warnings.simplefilter("ignore")  # zipfile warns of what is done here on purpose
        out.writestr("b_dec.npy", b"")
    with pytest.raises(InputError, match="each once"):
        FORMAT.read(path)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused_or_gives_an_sae_of_finite_numbers(
    place: int, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("damaged"), plain_arrays())
    data = bytearray(path.read_bytes())
    if cut:
        del data[place % len(data) :]
    else:
        data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        sae, _ = FORMAT.read(path)
        assert not cut
        assert all(bool(parameter.isfinite().all()) for parameter in sae.parameters())


@pytest.mark.parametrize("name", ["params", "params.json", "params.safetensors"])
def test_a_name_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the format's files in \.npz; name it params\.npz"):
        FORMAT.files(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    publish_json(tmp_path / "none.json", FACTS)
    with pytest.raises(InputError, match=r"none\.npz: cannot be read \(No such file"):
        FORMAT.read(tmp_path / "none.npz")


@pytest.mark.parametrize("spoilt_by", ["norms", "b_dec"])
def test_weights_that_overflow_when_they_are_folded_are_refused_in_one_line(spoilt_by: str, tmp_path: Path) -> None:
    """Every number of the file is finite, and the SAE would have infinite ones."""
    arrays = plain_arrays()
    arrays["W_enc"] *= np.float32(1e30)
    arrays["W_dec" if spoilt_by == "norms" else "b_dec"] *= np.float32(1e15)
    with pytest.raises(InputError, match=r"goes beyond float32 once b_dec and the norms of W_dec are folded into it"):
        FORMAT.read(written(tmp_path, arrays))


def test_thresholds_of_zero_are_finite_parameters_of_a_run_that_reads_back(tmp_path: Path, rows_store: Path) -> None:
    sae, _ = FORMAT.read(written(tmp_path, plain_arrays() | {"threshold": np.zeros(N_FEATURES, np.float32)}))
    write_run(tmp_path / "run", sae, rows_store, SITE)
    read, _ = load_run(tmp_path / "run")
    assert bool((read.get_parameter("log_threshold").exp() == 0).all())
