"""How results are printed: strict JSON, numbers with their digits, a few lines for a reader."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.commands.lines import SHOWN_NAMES, collect_lines, encode_lines, estimate_lines, recode_lines, repair_lines
from pipelines.commands.output import announced, as_json_text, duration, key_lines, number, size


def read(value: Any) -> Any:
    return json.loads(as_json_text(value), parse_constant=pytest.fail)


def test_numbers_of_numpy_are_numbers_in_json() -> None:
    values = {"n": np.int64(3), "share": np.float32(0.5), "is_dead": np.bool_(True), "rows": np.array([[1, 2], [3, 4]])}
    assert read(values) == {"n": 3, "share": 0.5, "is_dead": True, "rows": [[1, 2], [3, 4]]}
    assert read({np.int64(7): (np.float64(2.5), None)}) == {"7": [2.5, None]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")])
def test_what_is_no_finite_number_is_null(value: float) -> None:
    assert read({"a": value, "b": [value], "c": np.array([1.0, value])}) == {"a": None, "b": [None], "c": [1.0, None]}


def test_paths_are_text_and_text_keeps_its_letters() -> None:
    assert read({"out": Path("a/b")}) == {"out": "a/b"}
    assert "⏎é" in as_json_text({"token": "⏎é"})


@pytest.mark.parametrize("value", [object(), {1, 2}, Decimal("0.1"), b"bytes", SimpleNamespace(a=1)])
def test_a_type_without_a_form_in_json_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="has no form in JSON"):
        as_json_text({"value": value})


@pytest.mark.parametrize("key", [(1, 2), None, True, 0.5])
def test_a_key_that_json_has_not_is_refused(key: object) -> None:
    with pytest.raises(TypeError):
        as_json_text({key: 1})


def test_small_numbers_keep_their_digits() -> None:
    assert [number(n) for n in (3.1e-6, 0.000123456, 0.5, 99.994, 0.0, 12, 65_536, 65_536.4)] == [
        "3.1e-06",
        "0.0001235",
        "0.5",
        "99.99",
        "0",
        "12",
        "65,536",
        "65,536",
    ]


def test_sizes_and_times_read_at_a_glance() -> None:
    assert [size(n) for n in (0, 999, 1000, 10**6, 399_300_000, 10**18)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1 MB",
        "399.3 MB",
        "1000 PB",
    ]
    assert [duration(s) for s in (0, 59.9, 60, 3599, 3600, 90_000)] == [
        "0 s",
        "59.9 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "25 h 0 min",
    ]


def test_fields_are_lines_and_empty_ones_are_left_out() -> None:
    lines = key_lines({"rows": 1_234_567, "share": 3e-6, "is_new": True, "none": None, "empty": [], "sites": {"a": [1, 2]}})
    assert [" ".join(line.split()) for line in lines] == [
        "rows 1,234,567",
        "share 3e-06",
        "is_new yes",
        "sites",
        "a 1, 2",
    ]


def test_an_option_left_to_the_program_is_announced_as_auto(capsys: pytest.CaptureFixture[str]) -> None:
    config = SimpleNamespace(lr=(0.0, 0.001), l1=0.0, auxk=0.0, layer=None, site=("a", "b"), text="x\ny")
    assert announced("train", config, auto=("lr", "l1")) is config
    assert capsys.readouterr().err == "train: lr=auto,0.001 l1=auto auxk=0.0 site=a,b text=x⏎y\n"


def test_the_error_of_a_copy_is_not_rounded_to_zero() -> None:
    result = {
        "store": "s",
        "store_id": "i",
        "rows": 5,
        "disk_bytes": 2e6,
        "of_the_source": 0.5,
        "unexplained": {"a.0": 3.1e-6},
    }
    assert recode_lines(result)[-1].split() == ["unexplained,", "a.0", "3.1e-06"]


def test_long_lists_of_names_are_counted() -> None:
    names = [f"object-{n}" for n in range(SHOWN_NAMES + 2)]
    (line,) = [
        line
        for line in repair_lines({"store": "s", "faults": 7, "restored": [], "dropped": names, "shards": []})
        if line.startswith("dropped")
    ]
    assert line.endswith("object-4 and 2 more")


def test_what_matters_only_sometimes_is_said_only_then() -> None:
    added = dict.fromkeys(("documents", "heldout", "heldout_tokens", "tokens", "repeated", "near"), 0)
    collected = {"store": "s", "store_id": "i", "rows": 5, "tokens": 6, "shards": 2, "shards_committed_before": 0}
    collected["added"] = added
    assert len(collect_lines({**collected, "corpus_exhausted": False})) == 3
    lines = collect_lines({**collected, "shards_committed_before": 1, "corpus_exhausted": True, "device": "cpu"})
    assert [line.split()[0] for line in lines] == ["store", "rows", "shards", "device", "corpus"]
    assert "1 of them" in lines[2]
    usual = {"documents": 100, "heldout": 2, "heldout_tokens": 20, "tokens": 1000, "repeated": 0, "near": 0}
    lines = collect_lines({**collected, "corpus_exhausted": False, "added": usual})
    assert [line.split() for line in lines[3:]] == [
        ["held", "out", "2.0%", "of", "the", "tokens,", "2", "of", "100", "documents"]
    ]
    for unusual, said in (
        ({"heldout_tokens": 730}, "warning      73% of the tokens are held out and not trained on"),
        ({"heldout": 0, "heldout_tokens": 0}, "warning      nothing is held out"),
        ({"repeated": 3}, "copies       3 documents repeat the text of another, on the same side of the split"),
        ({"near": 2}, "near copies  2 held-out documents share half of their text with training documents"),
    ):
        lines = collect_lines({**collected, "corpus_exhausted": False, "added": usual | unusual})
        assert any(" ".join(line.split()).startswith(" ".join(said.split())) for line in lines)
    counted = collect_lines({**collected, "corpus_exhausted": False, "control_tokens": 1200})
    assert "1,200 tokens of the text are special tokens: this tokenizer cannot take them as text" in counted[3]
    encoded = {"codes": "c", "store_id": "i", "rows": 5, "features": 8, "code_width": 2, "disk_bytes": 10}
    assert not any(line.startswith("cut") for line in encode_lines({**encoded, "codes_cut": 0, "rows_cut": 0}))
    assert "cut       3 codes in 2 rows did not fit" in encode_lines({**encoded, "codes_cut": 3, "rows_cut": 2})


def test_an_estimate_says_disk_memory_and_time_in_units() -> None:
    result = {
        "tokens": 10**8,
        "rows": 99_000_000,
        "disk_bytes": 15 * 10**10,
        "disk_bytes_by_array": {"acts/resid_post.6": 149 * 10**9},
        "shards": 1200,
        "shard_rows": 81_920,
        "chunk_rows": 8192,
        "memory_bytes": 2 * 10**9,
        "tokens_per_s": 5000,
        "seconds": 20_000,
        "device": "cpu",
    }
    text = "\n".join(estimate_lines(result))
    assert all(part in text for part in ("150 GB", "149 GB", "2 GB", "5 h 33 min", "5,000 tokens/s"))
