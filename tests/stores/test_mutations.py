"""A file that was changed, by whatever or whomever, is refused in one line, soon and in little memory; it is never data.

`ACTSTORE_MUTATIONS` sets the number of mutations of each kind of file, 20 by default.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import Mutate, of_json, of_record, of_safetensors
from storekit import StoreSpec, write_store

from actstore.errors import ActstoreError
from actstore.files import content_hash
from actstore.reader import ActivationStore
from pipelines.analysis.cards import feature_card
from pipelines.analysis.reader import Analysis
from pipelines.sae.checkpoint import load_run
from pipelines.text.tokenizer_files import store_tokenizer
from pipelines.train.config import TrainConfig
from pipelines.train.saved_state import STATE, load_state
from pipelines.train.stage import train

N_MUTATIONS = int(os.environ.get("ACTSTORE_MUTATIONS", "20"))
MOST_SECONDS, MOST_BYTES = 5, 500 << 20
SPEC = StoreSpec(n_documents=20, document_tokens=12, shard_rows=64, chunk_rows=16)


def read_store(path: Path) -> str:
    """The content hash of all that a store gives."""
    store = ActivationStore(path)
    values: list[Any] = [store.snapshot, store.manifest.identity(), sorted(store.tokenizer_files())]
    for part in ("train", "heldout"):
        for shard in store.shards(part):
            values += [store.read(shard, array.name).tobytes().hex() for array in store.manifest.arrays]
            values.append(store.documents(shard).tolist())
        values += [store.statistics(site, part).mean.tolist() for site in store.sites]
    return content_hash(values)


def read_run(path: Path) -> str:
    sae, record = load_run(path)
    values = {name: tensor.numpy().tobytes().hex() for name, tensor in sae.state_dict().items()}
    return content_hash([record.run_id, values])


def read_state(path: Path) -> str:
    state = load_state(path)
    if state is None:
        return "none"
    tensors = [{name: tensor.numpy().tobytes().hex() for name, tensor in own.items()} for own in state.tensors]
    return content_hash([tensors, repr(state.facts)])


def read_analysis(path: Path) -> str:
    analysis = Analysis(path)
    values = [np.asarray(value).tolist() for value in (analysis.fires, analysis.frequency, analysis.mean, analysis.active)]
    return content_hash([repr(values), analysis.n_rows, analysis.n_features, repr(feature_card(analysis, 1))])


def read_tokenizer(path: Path) -> str:
    codec = store_tokenizer(ActivationStore(path))
    return content_hash([codec.sha256, codec.text(codec.ids(["The fox"])[0])])


@dataclass(frozen=True)
class Target:
    """A file, how it is mutated, and all that reads it."""

    made: str
    file: str
    mutate: Mutate
    read: Callable[[Path], str]


TARGETS = {
    "manifest": Target("made_up", "manifest.json", of_record, read_store),
    "segment": Target("made_up", "commits/0000/segment.json", of_record, read_store),
    "commit record": Target("made_up", "commits/0000/train/000001.json", of_record, read_store),
    "seal": Target("made_up", "commits/0000/sealed.json", of_json, read_store),
    "run.json": Target("run", "run.json", of_json, read_run),
    "weights": Target("run", "sae.safetensors", of_safetensors, read_run),
    "analysis.json": Target("analysis", "analysis.json", of_json, read_analysis),
    "training state": Target("unfinished", STATE, of_safetensors, read_state),
    "tokenizer": Target("store", "tokenizer/tokenizer.json", of_json, read_tokenizer),
}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A training that was stopped after its first steps."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train.session.discard_state", lambda folder: None, raising=False)
        patch.setattr("pipelines.train.stage.discard_state", lambda folder: None, raising=False)
        train(TrainConfig(store=store, out=out, layer=2, features=16, k=2, epochs=1, batch=256, checkpoint_minutes=1e-9))
    assert (out / STATE).exists()
    return out


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_refused_in_one_line_or_changes_nothing(
    name: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    target = TARGETS[name]
    made = write_store(tmp_path / "made", SPEC) if target.made == "made_up" else request.getfixturevalue(target.made)
    own = Path(shutil.copytree(made, tmp_path / "own"))
    sound = target.read(own)
    data, rng, refused = (own / target.file).read_bytes(), random.Random(name), 0
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    slowest = 0.0
    for number in range(N_MUTATIONS):
        mutated = target.mutate(data, rng)
        (own / target.file).write_bytes(mutated)
        start = time.perf_counter()
        try:
            result = target.read(own)
        except ActstoreError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message.strip(), f"mutation {number}"
            assert len(message) < 2000, f"mutation {number}"
        else:
            assert result == sound, f"mutation {number} was read as data: {mutated[:300]!r}"
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - memory_before
    print(f"\n{name}: {N_MUTATIONS} mutations, {refused} refused, the slowest in {slowest:.2f} s, {grown >> 20} MiB more")
    assert slowest < MOST_SECONDS
    assert grown < MOST_BYTES
