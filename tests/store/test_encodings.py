"""How rows are kept: what comes back, what is refused, and the exact bytes."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore.arrays import shard_object
from actstore.encodings.channels import Channels
from actstore.encodings.registry import activation_encodings, encoding_of, encodings
from actstore.errors import EncodingError
from actstore.layout import Layout
from actstore.schema import site_arrays

BF16_MAX = encoding_of("bf16").largest
EXACT = ("fp32", "fp16", "bf16")
"""Encodings that keep each value by itself."""


def matrices(largest: float) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-largest, largest, width=32)
    return arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 6)), elements=values)


def kept_alone(rows: np.ndarray, encoding: str) -> np.ndarray:
    """What an encoding without a scale keeps."""
    kept, scale = encoding_of(encoding).encode(rows)
    assert scale is None
    return kept


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


# fp32, fp16, bf16


@given(matrices(float(np.finfo(np.float32).max)))
def test_fp32_comes_back_exactly(rows: np.ndarray) -> None:
    assert encoding_of("fp32").decode(kept_alone(rows, "fp32")).tobytes() == rows.tobytes()


@given(matrices(65504.0))
def test_fp16_comes_back_within_half_an_ulp(rows: np.ndarray) -> None:
    kept = kept_alone(rows, "fp16")
    assert kept.dtype == np.float16
    back = encoding_of("fp16").decode(kept)
    assert back.dtype == np.float32
    ulp = np.ldexp(1.0, np.maximum(np.frexp(back)[1] - 1, -14) - 10)
    assert (np.abs(back.astype(np.float64) - rows) <= ulp / 2).all()


@pytest.mark.parametrize("width", [1, 3, 64])
def test_every_finite_fp16_comes_back_with_its_own_value(width: int) -> None:
    """All 63,488 of them, both zeros and every subnormal too, in rows of any width and more than one block."""
    bits = np.arange(2**16).astype(np.uint16)
    kept = bits[np.isfinite(bits.view(np.float16))].view(np.float16)
    assert len(kept) == 63_488
    kept = kept[: len(kept) // width * width].reshape(-1, width)
    back = encoding_of("fp16").decode(kept)
    assert back.dtype == np.float32
    assert back.tobytes() == kept.astype(np.float32).tobytes()


def test_fp16_rows_that_do_not_lie_together_come_back_too() -> None:
    kept = np.arange(60, dtype=np.float16).reshape(10, 6)
    for view in (kept[::2], kept[:, ::2], kept[:0], kept.T):
        np.testing.assert_array_equal(encoding_of("fp16").decode(view), view.astype(np.float32))


@given(matrices(BF16_MAX))
@example(np.array([[1.00390625, 1.01171875, -1.00390625, 1e-45, -0.0, BF16_MAX]], np.float32))
def test_bf16_is_rounded_to_nearest_even(rows: np.ndarray) -> None:
    kept = kept_alone(rows, "bf16")
    assert kept.dtype == np.uint16
    back = encoding_of("bf16").decode(kept)
    assert back.dtype == np.float32
    assert back.ravel().tolist() == [as_bf16(value) for value in rows.ravel()]


@pytest.mark.parametrize("encoding", EXACT)
@given(data=st.data())
def test_encoding_what_was_decoded_changes_nothing(encoding: str, data: st.DataObject) -> None:
    kept = kept_alone(data.draw(matrices(encoding_of(encoding).largest)), encoding)
    assert kept_alone(encoding_of(encoding).decode(kept), encoding).tobytes() == kept.tobytes()


# int8


@st.composite
def rows_and_channels(draw: st.DrawFn) -> tuple[np.ndarray, Channels]:
    """Rows of any finite values, tiny and huge ones too, and means and deviations that need not be theirs."""
    rows = draw(matrices(2.0**36))
    means = draw(arrays(np.float32, rows.shape[1], elements=st.floats(-(2.0**20), 2.0**20, width=32)))
    deviations = draw(arrays(np.float32, rows.shape[1], elements=st.floats(2.0**-16, 2.0**16, width=32)))
    return rows, Channels(means, deviations)


@given(rows_and_channels())
@example((np.array([[2.5e-43, 1e-44, 0, 0]], np.float32), Channels(np.zeros(4, np.float32), np.ones(4, np.float32))))
def test_int8_comes_back_within_half_a_step(case: tuple[np.ndarray, Channels]) -> None:
    """A step of a value is its row's scale times its channel's deviation; and float32 rounds what is computed."""
    rows, channels = case
    kept, scale = encoding_of("int8").encode(rows, channels)
    assert scale is not None
    assert (kept.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (len(rows),))
    back = encoding_of("int8").decode(kept, scale, channels)
    assert back.dtype == np.float32
    step = scale[:, None].astype(np.float64) * channels.deviation
    size = np.abs(rows.astype(np.float64)) + np.abs(channels.mean.astype(np.float64)) + 127 * step
    rounding = 4 * np.finfo(np.float32).eps * size + 1e-44
    assert (np.abs(back.astype(np.float64) - rows) <= step / 2 + rounding).all()


@given(rows_and_channels())
def test_an_int8_step_is_as_fine_as_127_allow_and_no_finer_than_a_29th_of_the_rows_root_mean_square(
    case: tuple[np.ndarray, Channels],
) -> None:
    rows, channels = case
    kept, scale = encoding_of("int8").encode(rows, channels)
    assert scale is not None
    standard = (rows.astype(np.float64) - channels.mean) / channels.deviation
    finest = np.maximum(np.abs(standard).max(axis=1) / 127, np.sqrt(np.square(standard).mean(axis=1)) / 29)
    plain = finest > 1e-18  # below that, squares of float32 are lost
    np.testing.assert_allclose(scale[plain], finest[plain], rtol=1e-4)
    assert (scale > 0).all()
    assert (kept >= -127).all()


def test_a_row_at_the_channels_means_comes_back_exactly() -> None:
    channels = Channels(np.array([3, -500], np.float32), np.array([1, 20], np.float32))
    rows = np.tile(channels.mean, (3, 1))
    kept, scale = encoding_of("int8").encode(rows, channels)
    assert not kept.any()
    np.testing.assert_array_equal(encoding_of("int8").decode(kept, scale, channels), rows)


def outlier_rows(n_rows: int, d_model: int) -> np.ndarray:
    """Rows as GPT-2's: most channels within a few units of 0, a few with means of hundreds, a heavy-tailed norm."""
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(0, 1, d_model), rng.lognormal(0.5, 0.4, d_model)
    means[[138, 378, 447]], deviations[[138, 378, 447]] = [900, -350, 240], [60, 25, 40]
    sizes = rng.lognormal(0, 0.25, (n_rows, 1))
    return (means + deviations * rng.standard_normal((n_rows, d_model)) * sizes).astype(np.float32)


def unexplained(rows: np.ndarray, back: np.ndarray) -> float:
    exact = rows.astype(np.float64)
    return float(np.square(exact - back).sum() / np.square(exact - exact.mean(axis=0)).sum())


def test_int8_leaves_at_most_2e_4_of_outlier_carrying_rows_unexplained() -> None:
    """With channels measured on the first eighth of the rows; per token alone it would be a hundred times worse."""
    rows = outlier_rows(4096, 768)
    first = rows[:512].astype(np.float64)
    channels = Channels.of_moments(first.mean(axis=0), np.square(first).mean(axis=0))
    kept, scale = encoding_of("int8").encode(rows, channels)
    assert unexplained(rows, encoding_of("int8").decode(kept, scale, channels)) <= 2e-4
    plain = Channels(np.zeros(768, np.float32), np.ones(768, np.float32))
    kept, scale = encoding_of("int8").encode(rows, plain)
    assert unexplained(rows, encoding_of("int8").decode(kept, scale, plain)) > 2e-2


def test_int8_takes_at_most_0_45_of_the_bytes_of_fp16() -> None:
    rows = outlier_rows(4096, 768)
    exact = rows.astype(np.float64)
    channels = Channels.of_moments(exact.mean(axis=0), np.square(exact).mean(axis=0))
    layout = Layout(4096, 4096, 1024)
    n_bytes = {}
    for encoding in ("fp16", "int8"):
        kept = encoding_of(encoding).encode(rows, channels)
        arrays = zip(site_arrays("site", 768, encoding), (part for part in kept if part is not None), strict=True)
        n_bytes[encoding] = sum(len(shard_object(array, layout, part)) for array, part in arrays)
    assert n_bytes["int8"] <= 0.45 * n_bytes["fp16"]


@given(matrices(1e6))
def test_channels_are_the_mean_and_the_deviation_of_their_rows(rows: np.ndarray) -> None:
    if not len(rows):
        return
    exact = rows.astype(np.float64)
    channels = Channels.of_moments(exact.mean(axis=0), np.square(exact).mean(axis=0))
    np.testing.assert_array_equal(channels.mean, exact.mean(axis=0).astype(np.float32))
    assert (channels.deviation > 0).all()
    varies = exact.std(axis=0) > np.maximum(1e-3 * np.abs(exact).max(axis=0), 1e-30)
    np.testing.assert_allclose(channels.deviation[varies], exact.std(axis=0)[varies], rtol=1e-4)


def test_a_channel_that_does_not_vary_is_measured_in_units() -> None:
    channels = Channels.of_moments(np.array([5.0, 0.0]), np.array([25.0, 4.0]))
    assert channels.deviation.tolist() == [1, 2]
    rounded_below = Channels.of_moments(np.array([0.1]), np.array([0.1 * 0.1 - 1e-18]))
    assert rounded_below.deviation.tolist() == [1]


@given(rows_and_channels())
def test_channels_come_back_from_their_table(case: tuple[np.ndarray, Channels]) -> None:
    _, channels = case
    table = channels.table
    assert (table.dtype, table.shape) == (np.float32, (2, len(channels.mean)))
    back = Channels.from_table(table)
    assert (back.mean.tobytes(), back.deviation.tobytes()) == (channels.mean.tobytes(), channels.deviation.tobytes())


def test_int8_without_its_channels_is_a_mistake() -> None:
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="int8 needs the channels' means and deviations"):
        encoding_of("int8").encode(rows)
    with pytest.raises(ValueError, match="int8 needs the rows' scales"):
        encoding_of("int8").decode(rows.astype(np.int8))


# What is refused


def wide_channels(width: int) -> Channels:
    """Deviations so large that any value is near the mean."""
    return Channels(np.zeros(width, np.float32), np.full(width, 1e25, np.float32))


@pytest.mark.parametrize("encoding", activation_encodings())
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_refused_with_its_place(encoding: str, value: float) -> None:
    rows = np.zeros((5, 4), np.float32)
    rows[3, 2] = rows[4, 0] = value
    message = rf"value {value} in channel 2 does not fit {encoding}; the model gave it"
    with pytest.raises(EncodingError, match=message) as error:
        encoding_of(encoding).encode(rows, wide_channels(4))
    assert error.value.row == 3


@pytest.mark.parametrize(("encoding", "step"), [("fp16", 1.0), ("bf16", 2.0**111), ("int8", 2.0**103)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_the_largest_is_refused_with_its_place_and_the_remedy(encoding: str, step: float, sign: int) -> None:
    rows = np.zeros((2, 3), np.float32)
    rows[1, 1] = sign * encoding_of(encoding).largest
    kept, scale = encoding_of(encoding).encode(rows, wide_channels(3))
    back = encoding_of(encoding).decode(kept, scale, wide_channels(3))
    np.testing.assert_allclose(back, rows, rtol=0.01 if encoding == "int8" else 0)
    rows[1, 1] += sign * step
    with pytest.raises(EncodingError, match=rf"in channel 1 does not fit {encoding}; .*fp32") as error:
        encoding_of(encoding).encode(rows, wide_channels(3))
    assert error.value.row == 1


def test_a_value_too_far_from_a_steady_channels_mean_is_refused_by_int8() -> None:
    """It is in range, its distance in deviations is not: kept, it would come back as anything."""
    channels = Channels(np.zeros(2, np.float32), np.array([1, 1e-30], np.float32))
    rows = np.array([[1, 1e-30], [1, 1e-13]], np.float32)
    assert encoding_of("int8").encode(rows[:1], channels)[0].tolist() == [[29, 29]]
    with pytest.raises(EncodingError, match="in channel 1 does not fit int8") as error:
        encoding_of("int8").encode(rows, channels)
    assert error.value.row == 1


def test_an_encoding_error_reaches_another_process_whole() -> None:
    with pytest.raises(EncodingError) as error:
        encoding_of("fp16").encode(np.array([[0], [np.nan]], np.float32))
    received = pickle.loads(pickle.dumps(error.value))
    assert type(received) is EncodingError
    assert (str(received), received.row) == (str(error.value), 1)


# The format


def test_integers_are_kept_as_they_are() -> None:
    values = np.array([0, 1, 65535], np.uint16)
    assert encoding_of("packed").decode(values) is values
    assert encoding_of("raw").decode(values) is values


def test_golden_bytes_guard_the_format() -> None:
    rows = np.array([[0.0, -0.0, 1.0, -2.5], [3.14159274, 1.00390625, 1.01171875, 65504.0]], np.float32)
    golden = {
        "fp32": "00000000 00000080 0000803f 000020c0 db0f4940 0080803f 0080813f 00e07f47",
        "fp16": "0000 0080 003c 00c1 4842 043c 0c3c ff7b",
        "bf16": "0000 0080 803f 20c0 4940 803f 823f 8047",
    }
    found = {name: kept_alone(rows, name).tobytes().hex(" ", encoding_of(name).itemsize) for name in golden}
    assert found == golden
    assert {name: (kind.dtype, kind.compressed) for name, kind in encodings().items()} == {
        "fp32": ("float32", False),
        "fp16": ("float16", False),
        "bf16": ("uint16", True),
        "int8": ("int8", True),
        "raw": ("", False),
        "packed": ("", True),
    }


def test_golden_int8_guards_the_format() -> None:
    """Row 0: deviations 1, -2, 2, 0 have root mean square 1.5, of which a step is a 29th. Row 1: one stands out, and
    takes 127 steps. Row 2 is at the means."""
    channels = Channels(np.array([10, 0, -4, 1] * 10, np.float32), np.array([2, 4, 0.5, 1] * 10, np.float32))
    rows = np.array([[12, -8, -3, 1] * 10, [-110, *channels.mean[1:]], channels.mean], np.float32)
    kept, scale = encoding_of("int8").encode(rows, channels)
    assert scale is not None
    assert kept.tolist() == [[19, -39, 39, 0] * 10, [-127, *[0] * 39], [0] * 40]
    np.testing.assert_allclose(scale, [1.5 / 29, 60 / 127, 1], rtol=1e-6)
    back = encoding_of("int8").decode(kept, scale, channels)
    expected = channels.mean + kept * scale[:, None].astype(np.float64) * channels.deviation
    np.testing.assert_allclose(back, expected, rtol=1e-6)
    assert hashlib.sha256(kept.tobytes() + scale.tobytes()).hexdigest()[:16] == "19364504af11f2fb"
