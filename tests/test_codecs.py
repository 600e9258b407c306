"""How rows are kept: what comes back, what is refused, and the exact bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore.codecs import ACTIVATION_ENCODINGS, ENCODINGS, LARGEST, decode_rows, encode_rows
from actstore.errors import EncodingError

BF16_MAX = LARGEST["bf16"]


def matrices(largest: float) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-largest, largest, width=32)
    return arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 6)), elements=values)


def as_bf16(value: np.float32) -> float:
    """The nearest bfloat16, ties to the even one, by looking at both neighbours in exact arithmetic."""
    below = np.array(value, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    neighbours = [below, below + np.uint32(0x10000)]
    distances = [abs(float(bits.view(np.float32)) - float(value)) for bits in neighbours]
    if distances[0] == distances[1]:
        chosen = neighbours[0] if (neighbours[0] >> np.uint32(16)) % 2 == 0 else neighbours[1]
    else:
        chosen = neighbours[int(distances[1] < distances[0])]
    return float(chosen.view(np.float32))


@given(matrices(float(np.finfo(np.float32).max)))
def test_fp32_comes_back_exactly(rows: np.ndarray) -> None:
    assert decode_rows(encode_rows(rows, "fp32"), "fp32").tobytes() == rows.tobytes()


@given(matrices(65504.0))
def test_fp16_comes_back_within_half_an_ulp(rows: np.ndarray) -> None:
    kept = encode_rows(rows, "fp16")
    assert kept.dtype == np.float16
    back = decode_rows(kept, "fp16")
    assert back.dtype == np.float32
    ulp = np.ldexp(1.0, np.maximum(np.frexp(back)[1] - 1, -14) - 10)
    assert (np.abs(back.astype(np.float64) - rows) <= ulp / 2).all()


@given(matrices(BF16_MAX))
@example(np.array([[1.00390625, 1.01171875, -1.00390625, 1e-45, -0.0, BF16_MAX]], np.float32))
def test_bf16_is_rounded_to_nearest_even(rows: np.ndarray) -> None:
    kept = encode_rows(rows, "bf16")
    assert kept.dtype == np.uint16
    back = decode_rows(kept, "bf16")
    assert back.dtype == np.float32
    assert back.ravel().tolist() == [as_bf16(value) for value in rows.ravel()]


@pytest.mark.parametrize("encoding", ACTIVATION_ENCODINGS)
@given(data=st.data())
def test_encoding_what_was_decoded_changes_nothing(encoding: str, data: st.DataObject) -> None:
    kept = encode_rows(data.draw(matrices(LARGEST[encoding])), encoding)
    assert encode_rows(decode_rows(kept, encoding), encoding).tobytes() == kept.tobytes()


@pytest.mark.parametrize("encoding", ACTIVATION_ENCODINGS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_refused_with_its_place(encoding: str, value: float) -> None:
    rows = np.zeros((5, 4), np.float32)
    rows[3, 2] = rows[4, 0] = value
    with pytest.raises(
        EncodingError, match=rf"value {value} at row 3, channel 2 does not fit {encoding}; the model gave it"
    ):
        encode_rows(rows, encoding)


@pytest.mark.parametrize(("encoding", "step"), [("fp16", 1.0), ("bf16", 2.0**111)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_the_largest_is_refused_with_its_place_and_the_remedy(encoding: str, step: float, sign: int) -> None:
    rows = np.zeros((2, 3), np.float32)
    rows[1, 1] = sign * LARGEST[encoding]
    assert np.isfinite(decode_rows(encode_rows(rows, encoding), encoding)).all()
    rows[1, 1] += sign * step
    with pytest.raises(EncodingError, match=rf"at row 1, channel 1 does not fit {encoding}; .*fp32"):
        encode_rows(rows, encoding)


def test_integers_are_kept_as_they_are() -> None:
    values = np.array([0, 1, 65535], np.uint16)
    assert decode_rows(values, "packed") is values
    assert decode_rows(values, "raw") is values


def test_golden_bytes_guard_the_format() -> None:
    rows = np.array([[0.0, -0.0, 1.0, -2.5], [3.14159274, 1.00390625, 1.01171875, 65504.0]], np.float32)
    itemsize = {name: ENCODINGS[name].itemsize for name in ACTIVATION_ENCODINGS}
    golden = {
        "fp32": "00000000 00000080 0000803f 000020c0 db0f4940 0080803f 0080813f 00e07f47",
        "fp16": "0000 0080 003c 00c1 4842 043c 0c3c ff7b",
        "bf16": "0000 0080 803f 20c0 4940 803f 823f 8047",
    }
    assert {name: encode_rows(rows, name).tobytes().hex(" ", itemsize[name]) for name in golden} == golden
    assert {name: (kind.dtype, kind.compressed) for name, kind in ENCODINGS.items()} == {
        "fp32": ("float32", False),
        "fp16": ("float16", False),
        "bf16": ("uint16", True),
        "raw": ("", False),
        "packed": ("", True),
    }
