"""`training.safetensors`: one changed bit, or facts and tensors that fit no training, are one line and never a resume."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from storekit import StoreSpec, write_store

from actstore.errors import DamagedStore
from pipelines.train import saved_state, session
from pipelines.train.config import TrainConfig
from pipelines.train.saved_state import STATE, Facts, load_state, save_state
from pipelines.train.stage import train
from pipelines.train.trainee import Counts

FACTS = Facts(
    snapshot="0123456789abcdef",
    rows_seen=300,
    diverged={"1": 100},
    configs=[{"k": 2, "lr": 0.25, "site": "resid_post"}, {"k": 2, "lr": 9.0, "site": "resid_post"}],
    counts=[Counts(3, 300), Counts(1, 100)],
    metrics=[{"loss": 0.5, "rows": 300}, {}],
    log_bytes=[17, 0],
    history=[[0, 1], [200, 2]],
)
TENSORS = [{"sae/b_dec": torch.arange(3.0), "last_fired": torch.arange(2)} for _ in range(2)]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_state_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, FACTS)
    saved = load_state(tmp_path)
    assert saved is not None
    assert (saved.facts, saved.facts.alive()) == (FACTS, [0])
    for found, given in zip(saved.tensors, TENSORS, strict=True):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)


def test_each_bit_of_a_saved_state_is_covered_by_its_sum(tmp_path: Path) -> None:
    """Every single bit: of the header's length, of its JSON, of the tensors."""
    save_state(tmp_path, TENSORS, FACTS)
    path = tmp_path / STATE
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DamagedStore) as refusal:
            load_state(tmp_path)
        line = str(refusal.value)
        assert line.startswith(f"{path}: cannot be continued from ("), bit
        assert line.endswith("; move it away and train anew."), bit
    path.write_bytes(data)
    assert load_state(tmp_path) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: {name: value for name, value in facts.items() if name != "counts"}, "missing required field"),
        (lambda facts: facts | {"more": 1}, "unknown field more"),
        (lambda facts: facts | {"snapshot": "../../else"}, "snapshot"),
        (lambda facts: facts | {"rows_seen": "300"}, "rows_seen"),
        (lambda facts: facts | {"rows_seen": 1 << 60}, "rows_seen"),
        (lambda facts: facts | {"rows_seen": 299}, "its SAEs are at different steps, or not at the 299 rows"),
        (lambda facts: facts | {"counts": facts["counts"][:1]}, "2 configs, 1 counts, 2 metrics, 2 logs"),
        (lambda facts: facts | {"configs": [{"k": [[[2]]]}, {}]}, "configs"),
        (lambda facts: facts | {"configs": []}, "configs"),
        (lambda facts: facts | {"diverged": {"0": 1, "1": 1}}, "2 of 2 SAEs diverged"),
        (lambda facts: facts | {"diverged": {"7": 1}}, "1 of 2 SAEs diverged, by the numbers 7"),
        (lambda facts: facts | {"log_bytes": [-1, 0]}, "log_bytes"),
        (lambda facts: facts | {"history": [[0]]}, "history"),
        (lambda facts: [facts], "Expected `object`"),
        (lambda _: 1e999, "not readable as JSON"),
    ],
)
def test_facts_that_no_training_saved_are_refused_even_where_the_sum_fits(
    change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = change(asdict(FACTS))
    monkeypatch.setattr(saved_state, "asdict", lambda _: changed)
    monkeypatch.setattr(saved_state.json, "dumps", lambda value, **_: _dumps(value))
    save_state(tmp_path, TENSORS, FACTS)
    with pytest.raises(DamagedStore, match=r"cannot be continued from \(.*" + re.escape(said)):
        load_state(tmp_path)


_dumps = saved_state.json.dumps


def test_a_tensor_of_no_sae_is_refused_before_a_list_is_made_for_it(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, FACTS)
    path = tmp_path / STATE
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path) | {"999999999999/sae/b_dec": torch.zeros(3)}
    header[saved_state.SUM] = saved_state._digest(header[saved_state.FACTS], tensors)
    save_file(tensors, path, header)
    with pytest.raises(DamagedStore, match=r"tensor '999999999999/sae/b_dec' belongs to none of 2 SAEs"):
        load_state(tmp_path)


# In a training


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A training that was cut off after its second saved state."""
    folder = tmp_path_factory.mktemp("begun")
    spec = StoreSpec(n_documents=40, sites=(("resid_post.0", "fp16"),), d_model=8, shard_rows=512, chunk_rows=64)
    store = write_store(folder / "store", spec)
    config = TrainConfig(
        store=store, out=folder / "run", features=32, k=2, batch=64, tokens=640, device="cpu", checkpoint_minutes=1e-9
    )
    save, left = session.save_state, [2]

    def cut_off(*arguments: Any) -> None:
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "save_state", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    return replace(config, resume=True)


def test_a_bit_changed_anywhere_in_a_state_is_no_resume_with_other_weights(begun: TrainConfig) -> None:
    """Among others that of the issue: `n_steps` in the header's JSON."""
    path = begun.out / STATE
    data = path.read_bytes()
    n_steps = 8 * (data.index(b"n_steps") + len(b'n_steps\\": '))
    others = np.random.default_rng(0).integers(0, 8 * len(data), 40).tolist()
    try:
        for bit in (n_steps, n_steps + 1, *others):
            path.write_bytes(flipped(data, bit))
            with pytest.raises(DamagedStore, match="cannot be continued from"):
                train(begun)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("sae/W_enc", torch.zeros(8, 32), "tensor 'sae/W_enc' is float32 [8, 32], needed is float32 [32, 8]"),
        ("sae/b_enc", torch.zeros(32, dtype=torch.float64), "tensor 'sae/b_enc' is float64 [32], needed is float32 [32]"),
        ("adam/b_dec/exp_avg", torch.zeros(7), "tensor 'adam/b_dec/exp_avg' is float32 [7], needed is float32 [8]"),
        ("adam/b_dec/other", torch.zeros(8), "tensor 'adam/b_dec/other' is float32 [8], needed is none"),
        ("last_fired", None, "tensor 'last_fired' is none, needed is int64 [32]"),
        ("sae/W_dec", torch.full((32, 8), torch.nan), "tensor 'sae/W_dec' holds NaN or infinity"),
    ],
)
def test_tensors_that_are_not_those_of_the_sae_are_refused(
    name: str, tensor: torch.Tensor | None, said: str, begun: TrainConfig
) -> None:
    path = begun.out / STATE
    data = path.read_bytes()
    saved = load_state(begun.out)
    assert saved is not None
    changed = {key: value for key, value in saved.tensors[0].items() if key != name or tensor is not None}
    if tensor is not None:
        changed[name] = tensor
    try:
        save_state(begun.out, [changed], saved.facts)
        with pytest.raises(DamagedStore, match=re.escape(said)):
            train(begun)
    finally:
        path.write_bytes(data)
