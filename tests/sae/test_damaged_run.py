"""A run from someone else: records and weights that no training wrote are one line, before anything is allocated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actstore.errors import DamagedStore, InputError, NotAStore, StoreError
from actstore.files import content_hash, file_sha256
from pipelines.sae.architectures.registry import architectures, forms, make
from pipelines.sae.checkpoint import RECORD, WEIGHTS, RunRecord, load_run, save_run
from pipelines.sae.run_record import LARGEST_RECORD, read_run_record
from pipelines.sae.tensor_file import forms_of

D, F, K = 4, 8, 2


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", "topk")


def write_run(path: Path, architecture: str) -> Path:
    record = RunRecord(
        architecture=architecture,
        d_model=D,
        n_features=F,
        k=K,
        code_width=K,
        site="resid_post.0",
        store_id="0" * 16,
        snapshot="1" * 16,
        weights_sha256="2" * 64,
        model="a model",
        bos=True,
        input_scale=0.5,
        rows_seen=100,
        history=[[0, 1]],
        config={"store": "a store", "origin": {"site": "resid_post.0"}},
        metrics={"dead_features": 0, "dead_window_rows": 100, "fve": 0.5},
    )
    save_run(path, make(architecture, D, F, K), record)
    return path


def restate(run: Path, **changes: Any) -> None:
    """Change a record, None for a field that is dropped, and state the sums that the changed one has."""
    value = {**json.loads((run / RECORD).read_text()), "sae_sha256": file_sha256(run / WEIGHTS)} | changes
    value = {
        name: field for name, field in value.items() if field is not None and name not in ("run_id", "format", "version")
    }
    stated = {"format": "actstore-run", "version": 2, "run_id": content_hash(value)[:16]}
    (run / RECORD).write_text(json.dumps(value | stated))


@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_the_forms_of_an_architecture_are_those_of_its_saes(architecture: str) -> None:
    assert forms(architecture, D, F, K) == forms_of(make(architecture, D, F, K).state_dict())


@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_a_run_of_each_architecture_reads_back(architecture: str, tmp_path: Path) -> None:
    sae, record = load_run(write_run(tmp_path / "run", architecture))
    written = make(architecture, D, F, K).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in sae.state_dict().items())
    assert read_run_record(tmp_path / "run") == record


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_features": "8"}, "n_features"),
        ({"n_features": 8.5}, "n_features"),
        ({"n_features": 0}, "n_features"),
        ({"n_features": 10**12}, "n_features"),
        ({"n_features": 10**40}, "n_features"),
        ({"n_features": True}, "n_features"),
        ({"d_model": -4}, "d_model"),
        ({"d_model": [4]}, "d_model"),
        ({"k": 0}, "k"),
        ({"k": 9}, "k 9 and 2 codes of a row kept, of 8 features"),
        ({"code_width": 10_000}, "10000 codes of a row kept, of 8 features"),
        ({"k": None}, "missing required field `k`"),
        ({"more": 1}, "unknown field more"),
        ({"site": "../../etc/passwd"}, "site"),
        ({"site": 3}, "site"),
        ({"store_id": "0" * 15 + "/"}, "store_id"),
        ({"snapshot": ""}, "snapshot"),
        ({"weights_sha256": "x"}, "weights_sha256"),
        ({"input_scale": 0}, "input_scale"),
        ({"rows_seen": -1}, "rows_seen"),
        ({"history": [[0, 1, 2]]}, "history"),
        ({"history": nested(300)}, "history"),
        ({"config": {"store": "s", "k": nested(300)}}, "config"),
        ({"config": {"origin": {"site": {}}}}, "config"),
        ({"metrics": {"dead_features": "0", "dead_window_rows": 1}}, "metrics"),
        ({"bos": 1}, "bos"),
        ({"model": {}}, "model"),
    ],
)
def test_a_record_that_no_run_has_is_refused_even_where_its_sum_fits(changes: dict[str, Any], said: str, run: Path) -> None:
    restate(run, **changes)
    for read in (read_run_record, load_run):
        with pytest.raises(DamagedStore, match=re.escape(str(run / RECORD)) + r": .*" + re.escape(said)):
            read(run)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '"x"', "[" * 100_000, '{"n_features": NaN}', '{"k": 1e999}', '{"model": "\\ud83d"}', "\ufeff{}"],
    ids=range(10),
)
def test_a_record_that_is_no_json_object_is_refused(text: str, run: Path) -> None:
    (run / RECORD).write_text(text)
    with pytest.raises(StoreError, match=r"not readable as JSON|not a run of format version"):
        read_run_record(run)


def test_a_record_too_long_to_be_one_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(run / RECORD, "r+b") as file:
        file.truncate(LARGEST_RECORD + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(DamagedStore, match=r"16,777,217 bytes, a record has at most 16,777,216"):
        read_run_record(run)


def test_an_unknown_architecture_is_one_line(run: Path) -> None:
    restate(run, architecture="none")
    with pytest.raises(InputError, match="there is none of that name; choose one of"):
        load_run(run)


WeightsChange = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own | {"W_enc": own["W_enc"].T.contiguous()}, "'W_enc' is float32 [4, 8], needed is float32 [8, 4]"),
        (lambda own: own | {"b_dec": own["b_dec"].double()}, "'b_dec' is F64 [4], needed is float32 [4]"),
        (lambda own: own | {"b_enc": own["b_enc"].half()}, "'b_enc' is F16 [8], needed is float32 [8]"),
        (lambda own: own | {"threshold": torch.ones(())}, "'threshold' is float32 [], needed is none"),
        (lambda own: {name: own[name] for name in own if name != "b_enc"}, "'b_enc' is none, needed is float32 [8]"),
        (lambda own: own | {"W_dec": own["W_dec"] * torch.nan}, "'W_dec' holds NaN or infinity"),
        (lambda own: own | {"b_dec": own["b_dec"] - torch.inf}, "'b_dec' holds NaN or infinity"),
    ],
)
def test_weights_that_are_not_the_architectures_are_refused_even_where_their_sum_fits(
    change: WeightsChange, said: str, run: Path
) -> None:
    save_file(change(dict(make("topk", D, F, K).state_dict())), run / WEIGHTS)
    restate(run)
    with pytest.raises(DamagedStore, match=re.escape(str(run / WEIGHTS)) + r": tensor " + re.escape(said)):
        load_run(run)


def test_widths_that_the_weights_have_not_are_found_before_anything_is_allocated(run: Path) -> None:
    """Two matrices of 2⁴⁸ numbers: an allocation would fail by itself."""
    restate(run, d_model=1 << 24, n_features=1 << 24)
    with pytest.raises(DamagedStore, match=r"'W_dec' is float32 \[8, 4\], needed is float32 \[16777216, 16777216\]"):
        load_run(run)


def test_weights_that_are_no_safetensors_are_refused_even_where_their_sum_fits(run: Path) -> None:
    (run / WEIGHTS).write_bytes(b"\xff" * 100)
    restate(run)
    with pytest.raises(DamagedStore, match="not readable as safetensors"):
        load_run(run)


def test_a_changed_weight_is_still_no_run(run: Path) -> None:
    data = bytearray((run / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (run / WEIGHTS).write_bytes(data)
    with pytest.raises(NotAStore, match="not this run's weights"):
        load_run(run)


def test_a_run_that_does_not_say_what_a_stage_needs_is_one_line(run: Path) -> None:
    record = replace(read_run_record(run), config={}, metrics={})
    with pytest.raises(InputError, match=r"run [0-9a-f]{16}: its config has no store; pass it"):
        record.option("store")
    with pytest.raises(InputError, match="its metrics have no dead_features"):
        record.figure("dead_features")
