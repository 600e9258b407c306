"""A new encoding is one file: what lies in the package is offered, kept, read, streamed, copied and verified."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from storekit import StoreSpec, write_store

import actstore.encodings
from actstore.encodings.channels import Channels
from actstore.encodings.registry import activation_encodings, encoding_of, encodings
from actstore.errors import InputError
from actstore.folder import Folder
from actstore.integrity import find_faults
from actstore.reader import ActivationStore
from actstore.recode import recode_store
from actstore.schema import site_arrays
from actstore.stream import BatchStream
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.stores.care import RecodeConfig
from pipelines.torch_stream import ActivationDataset

HEAD = """
import numpy as np
from actstore.encodings.base import Encoding
"""
FILES = {
    "scaled": """
class Scaled(Encoding):
    def keep(self, rows, channels):
        scale = np.maximum(np.abs(rows).max(axis=1) / np.float32(32000), np.float32(1e-30))
        return np.rint(rows / scale[:, None]).astype(np.int16), scale

    def decode(self, kept, scale=None, channels=None, out=None):
        return kept * scale[:, None]

ENCODING = Scaled("scaled", "int16", compressed=True, largest=1e30, has_scale=True, offered=5)
""",
    "centred": """
class Centred(Encoding):
    def keep(self, rows, channels):
        return rows - channels.mean, None

    def decode(self, kept, scale=None, channels=None, out=None):
        return kept + channels.mean

ENCODING = Centred("centred", "float32", compressed=False, largest=1e30, needs_channels=True, offered=5)
""",
    "halved": """
class Halved(Encoding):
    def keep(self, rows, channels):
        return rows / 2, None

    def decode(self, kept, scale=None, channels=None, out=None):
        return np.multiply(kept, np.float32(2), out=out)

ENCODING = Halved("halved", "float32", compressed=True, largest=1e30, is_exact=True, offered=5)
""",
}
"""With a scale of each row; with the channels' means; with neither, and of a dtype that looks decoded."""
SITE = "c.0"


@pytest.fixture(params=FILES)
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an encoding whose file lies in the package."""
    name = request.param
    folder = tmp_path / "encodings"
    folder.mkdir()
    (folder / f"{name}.py").write_text(HEAD + FILES[name])
    monkeypatch.setattr(actstore.encodings, "__path__", [*actstore.encodings.__path__, str(folder)])
    encodings.cache_clear()
    activation_encodings.cache_clear()
    yield name
    sys.modules.pop(f"actstore.encodings.{name}", None)
    encodings.cache_clear()
    activation_encodings.cache_clear()


@pytest.fixture
def exact(tmp_path: Path) -> ActivationStore:
    """The rows of every store below, as fp32."""
    return ActivationStore(write_store(tmp_path / "exact", StoreSpec(sites=((SITE, "fp32"),))))


def test_rows_are_collected_in_an_added_encoding(
    added: str, small_store: Path, small_config: CollectConfig, tmp_path: Path
) -> None:
    collect(replace(small_config, encoding=added, out=tmp_path / "store"))
    store, exact = ActivationStore(tmp_path / "store"), ActivationStore(small_store)
    (site,) = store.sites
    for shard, same in zip(store.shards(), exact.shards(), strict=True):
        np.testing.assert_allclose(store.read(shard, f"acts/{site}"), exact.read(same, f"acts/{site}"), rtol=1e-4, atol=1e-3)
    assert find_faults(Folder(tmp_path / "store")) == []


def assert_same_rows(store: ActivationStore, exact: ActivationStore) -> None:
    for part in ("train", "heldout"):
        for shard, same in zip(store.shards(part), exact.shards(part), strict=True):
            expected = exact.read(same, f"acts/{SITE}")
            np.testing.assert_allclose(store.read(shard, f"acts/{SITE}"), expected, rtol=1e-6, atol=2)
            np.testing.assert_array_equal(store.token_ids(shard), exact.token_ids(same))


def test_an_added_encoding_is_offered_last(added: str) -> None:
    assert activation_encodings() == ("fp16", "fp32", "bf16", "int8", added)
    assert RecodeConfig("in", "out", added).encoding == added
    with pytest.raises(InputError, match=rf"choose from fp16, fp32, bf16, int8, {added}\."):
        RecodeConfig("in", "out", "fp8")


def test_a_store_of_an_added_encoding_gives_its_rows_back(added: str, exact: ActivationStore, tmp_path: Path) -> None:
    store = ActivationStore(write_store(tmp_path / "store", StoreSpec(sites=((SITE, added),))))
    assert [array.name for array in store.manifest.arrays[2:]] == [
        array.name for array in site_arrays(SITE, store.d_model(SITE), added)
    ]
    assert (f"scales/{SITE}" in [array.name for array in store.manifest.arrays]) == encoding_of(added).has_scale
    assert_same_rows(store, exact)
    assert find_faults(Folder(tmp_path / "store")) == []


@pytest.mark.parametrize("normalise", ["none", "standardise"])
def test_rows_of_an_added_encoding_stream_as_those_of_fp32(
    added: str, normalise: str, exact: ActivationStore, tmp_path: Path
) -> None:
    store = ActivationStore(write_store(tmp_path / "store", StoreSpec(sites=((SITE, added),))))
    streams = (BatchStream(own, SITE, 50, epochs=2, normalise=normalise) for own in (store, exact))
    for batch, expected in zip(*streams, strict=True):
        assert batch.dtype == np.float32
        np.testing.assert_allclose(batch, expected, rtol=1e-4, atol=2)
    tensors = (ActivationDataset(own, SITE, 50, epochs=1) for own in (store, exact))
    for tensor, same in zip(*tensors, strict=True):
        torch.testing.assert_close(tensor, same, rtol=1e-4, atol=2)
    with pytest.raises(InputError, match=f"as_kept: int8, {added} rows and normalised ones are computed"):
        BatchStream(store, SITE, 50, as_kept=True)
    with pytest.raises(InputError, match=f"dtype None: int8, {added} rows"):
        ActivationDataset(store, SITE, 50, dtype=None)


def test_a_store_is_recoded_to_an_added_encoding_and_back(added: str, exact: ActivationStore, tmp_path: Path) -> None:
    report = recode_store(exact.url, tmp_path / "copy", added)
    assert report["unexplained"][SITE] < 1e-3
    copy = ActivationStore(tmp_path / "copy")
    assert_same_rows(copy, exact)
    assert find_faults(Folder(tmp_path / "copy")) == []
    if encoding_of(added).needs_channels:
        (first, *_) = copy.segments
        measured = copy.channels(first.index, f"acts/{SITE}")
        assert isinstance(measured, Channels)
        assert measured.mean.shape == (copy.d_model(SITE),)
    recode_store(tmp_path / "copy", tmp_path / "back", "fp32")
    back = ActivationStore(tmp_path / "back")
    assert_same_rows(back, exact)
    assert (back.manifest.source == {}) == encoding_of(added).is_exact
