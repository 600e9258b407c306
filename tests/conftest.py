"""Fixtures that several test files share. A synthetic store needs none: see `storekit.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when modelkit loads torch

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from pipelines.collect.config import CollectConfig

import torch
from daskkit import address_of, dask_process
from modelkit import build_model, write_texts

pytest.register_assert_rewrite("rowkit")


LAST = ("processes", "cluster", "browser")
"""Markers of tests that start something: in each room they run after the others, so that a fault shows early."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the rooms in their order, and in each the fast proofs first; files stay whole."""
    last_files = {item.path for item in items if any(item.get_closest_marker(name) for name in LAST)}
    rooms = {folder: place for place, folder in enumerate(dict.fromkeys(item.path.parent for item in items))}
    items.sort(key=lambda item: (rooms[item.path.parent], item.path in last_files))


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """What a test writes need not outlive a power cut; waiting for the disk would be most of the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Matrices this small gain nothing from a second thread, and lose a lot to waiting for it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small text files."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A tiny GPT-2 with its tokenizer, as a transformers folder."""
    return build_model(tmp_path_factory.mktemp("model"), texts)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, texts: Path, model_folder: Path) -> Path:
    """A collected store of the tiny model: `resid_post` after blocks 0 and 2, fp32, all of the texts. Read-only."""
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.stage import collect

    out = tmp_path_factory.mktemp("collected") / "store"
    collect(CollectConfig(out=out, model=str(model_folder), corpus=str(texts), layer=(0, 2), context=32, encoding="fp32"))
    return out


@pytest.fixture(scope="session")
def small_config(model_folder: Path, texts: Path) -> CollectConfig:
    """What tests of collecting ask for, each at its own `out`: 1,500 tokens in 13 shards, one layer, in float32."""
    from pipelines.collect.config import CollectConfig

    return CollectConfig(
        out="unset", model=str(model_folder), corpus=str(texts), layer=(0,), tokens=1500, context=32, encoding="fp32"
    )


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory, small_config: CollectConfig) -> Path:
    """The store that `small_config` describes. Read-only."""
    from pipelines.collect.stage import collect

    out = tmp_path_factory.mktemp("small") / "store"
    collect(replace(small_config, out=out))
    return out


@pytest.fixture
def own_store(small_store: Path, tmp_path: Path) -> Path:
    """A copy of `small_store` to change."""
    return Path(shutil.copytree(small_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> GPT2LMHeadModel:
    """The model as transformers loads it."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(model_folder).eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A run trained on the store's `resid_post.2`: 64 features, k = 4. Read-only."""
    from pipelines.train.config import TrainConfig
    from pipelines.train.stage import train

    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(store=store, out=out, layer=2, features=64, k=4, epochs=4, batch=256))
    return out


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A Dask client whose one worker is a thread of this process: the real scheduling without its start-up time."""
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a `dask scheduler` in a process of its own; its file is in `tmp_path`."""
    with dask_process("scheduler", "--port", "0", "--host", "127.0.0.1", folder=tmp_path):
        yield address_of(tmp_path)


@pytest.fixture(scope="session")
def codes(tmp_path_factory: pytest.TempPathFactory, store: Path, run: Path, client: Any) -> Path:
    """The code store of `store` and `run`. Read-only."""
    from pipelines.codes.stage import EncodeConfig, encode

    out = tmp_path_factory.mktemp("encoded") / "codes"
    encode(EncodeConfig(store=store, run=run, out=out), client)
    return out


@pytest.fixture(scope="session")
def analysis(tmp_path_factory: pytest.TempPathFactory, codes: Path, client: Any) -> Path:
    """The analysis of `codes`. Read-only."""
    from pipelines.analysis.stage import AnalyzeConfig, analyze

    out = tmp_path_factory.mktemp("analyzed") / "analysis"
    analyze(AnalyzeConfig(codes=codes, out=out), client)
    return out
