"""A store from a stranger, whose hashes all match, is read as what it says, or refused in one line; it never does more."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from forgery import Edit, forge, forge_object, forge_store
from numcodecs import blosc
from storekit import StoreSpec, files_of, write_store

from actstore import paths
from actstore.array_metadata import parse_array_metadata
from actstore.arrays import Unreadable, unpack_chunk
from actstore.errors import DamagedStore, NotAStore
from actstore.files import object_entry
from actstore.folder import Folder
from actstore.integrity import find_faults
from actstore.reader import ActivationStore
from actstore.recode import recode_store

SPEC = StoreSpec(
    n_documents=20,
    document_tokens=12,
    shard_rows=64,
    chunk_rows=16,
    sites=(("resid_post.0", "fp32"), ("resid_post.1", "bf16")),
)
NO_RECORDS = {
    "endless": b"[" * 100_000,
    "half a character": b'{"a": "\\ud83d"}',
    "no number": b'{"a": NaN}',
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "no text": b"\xff\xfe",
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
}
TABLE = "data.zarr/segments/0000/documents/source"
REFUSALS = (DamagedStore, NotAStore)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that no test changes."""
    return write_store(tmp_path_factory.mktemp("store") / "store", SPEC)


@pytest.fixture
def own(path: Path, tmp_path: Path) -> Path:
    """A copy to forge."""
    return Path(shutil.copytree(path, tmp_path / "store"))


def read_all(path: Path) -> None:
    """Everything that a reader reads."""
    store = ActivationStore(path)
    store.tokenizer_files()
    for part in ("train", "heldout"):
        for shard in store.shards(part):
            for array in store.manifest.arrays:
                store.read(shard, array.name)
            store.documents(shard)
        for site in store.sites:
            store.statistics(site, part)
    store.locate(0)


def require_refused(path: Path, match: str) -> None:
    """Every reader refuses it in one line, `verify` names a fault or refuses it as well, and nothing takes long."""
    start = time.perf_counter()
    with pytest.raises(REFUSALS, match=match) as refusal:
        read_all(path)
    assert "\n" not in str(refusal.value)
    try:
        faults = [str(fault) for fault in find_faults(Folder(path), "crc")]
    except REFUSALS as error:
        faults = [str(error)]
    assert faults
    assert not any("\n" in fault for fault in faults)
    assert time.perf_counter() - start < 5


def test_a_forged_store_that_says_nothing_new_is_read(own: Path) -> None:
    """The forger's hashes do match: what is refused below is refused for what it says."""
    forge_store(own, manifest=lambda value: value["identity"].update(seed=1))
    read_all(own)


# Zarr metadata


def test_metadata_of_zarr_v2_is_no_array(own: Path) -> None:
    """The `pickle` codec of numcodecs runs what it unpacks; a record cannot name `.zarray` either."""
    v2 = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": {"id": "pickle"}}
    v2 |= {"filters": [{"id": "vlen-utf8"}], "fill_value": None, "order": "C"}
    (own / TABLE / "zarr.json").unlink()
    (own / TABLE / ".zarray").write_text(json.dumps(v2))

    def commit(value: dict[str, Any]) -> None:
        value["objects"][f"{TABLE}/.zarray"] = object_entry((own / TABLE / ".zarray").read_bytes())
        del value["objects"][f"{TABLE}/zarr.json"]

    forge_store(own, segment=commit)
    require_refused(own, r"segment\.json: .*matching regex")
    forge_store(own, segment=lambda value: value["objects"].pop(f"{TABLE}/.zarray"))
    require_refused(own, "documents/source")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda value: value["codecs"].append({"name": "numcodecs.pickle"}), "codec 'numcodecs.pickle'; only"),
        (lambda value: value["codecs"].append({"name": "vlen-utf8"}), "codec 'vlen-utf8'; only"),
        (lambda value: value["codecs"].append("vlen-utf8"), "Expected `object`, got `str`"),
        (lambda value: value["codecs"].reverse(), "in another order or with other settings"),
        (lambda value: value.update(data_type="variable_length_utf8"), "Invalid enum value 'variable_length_utf8'"),
        (lambda value: value.update(zarr_format=2), "Invalid enum value 2"),
        (lambda value: value.update(shape=[1 << 60]), "Expected `int` <="),
        (lambda value: value.update(shape=[1 << 40]), "objects, 1 were committed"),
        (lambda value: value["chunk_grid"]["configuration"].update(chunk_shape=[1 << 39]), "shape .* in objects of"),
        (lambda value: value["chunk_grid"]["configuration"].update(chunk_shape=["1"]), "Expected `int`, got `str`"),
        (lambda value: value.update(shape=[-1]), "Expected `int` >= 0"),
        (lambda value: value.update(codecs={"name": "bytes"}), "Expected `array`, got `object`"),
        (lambda value: value.pop("chunk_grid"), "missing required field `chunk_grid`"),
        (lambda value: value.update(surprise=1), "unknown field surprise"),
    ],
)
def test_metadata_names_codecs_dtypes_and_shapes_of_ours_or_is_refused(own: Path, edit: Edit, match: str) -> None:
    value = json.loads((own / TABLE / "zarr.json").read_bytes())
    edit(value)
    forge_object(own, f"{TABLE}/zarr.json", json.dumps(value).encode())
    with pytest.raises(DamagedStore, match=match):
        ActivationStore(own).document_names(0)


def test_metadata_of_every_array_that_is_written_passes(own: Path) -> None:
    for file in own.rglob("zarr.json"):
        if json.loads(file.read_bytes())["node_type"] == "array" and "/acts/" not in str(file) and "/rows/" not in str(file):
            assert parse_array_metadata(file.read_bytes(), str(file), "zstd").zarr_format == 3


# Names


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", ".bashrc", "a/../../b", "a\x00b", "a\nb", ""])
def test_a_tokenizer_file_is_named_as_one_or_the_store_is_refused(own: Path, tmp_path: Path, name: str) -> None:
    data = b"mine now"
    (own / "escaped").write_bytes(data)
    forge_store(own, manifest=lambda value: value["provenance"]["tokenizer_files"].update({name: object_entry(data)}))
    require_refused(own, "tokenizer_files: .*matching regex")
    with pytest.raises(REFUSALS):
        recode_store(own, tmp_path / "copy", "fp16")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ["data.zarr/../../outside", "/etc/hostname", "tokenizer/tokenizer.json", "data.zarr//x"])
def test_a_record_names_objects_below_the_data_or_is_refused(own: Path, name: str) -> None:
    entry = {"bytes": 0, "sha256": "0" * 64}
    forge_store(own, segment=lambda value: value["objects"].update({name: entry}))
    require_refused(own, r"segment\.json: .*matching regex")


def test_a_shard_record_names_the_objects_of_its_shard_and_no_others(own: Path) -> None:
    def swap(value: dict[str, Any]) -> None:
        (name,) = (name for name in value["objects"] if "acts/resid_post.0" in name)
        value["objects"][name.replace("/c/", "/c/9")] = value["objects"].pop(name)

    forge_store(own, shard=swap)
    require_refused(own, "is of another shard")


def test_a_link_is_no_object_for_reading_or_writing(own: Path, tmp_path: Path) -> None:
    """With `tokenizer` a link, a file of that name would be written outside of the store."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tokenizer.json").write_bytes(b"{}")
    shutil.rmtree(own / "tokenizer")
    (own / "tokenizer").symlink_to(outside)
    before = files_of(outside)
    for act in (
        lambda place: place.publish("tokenizer/tokenizer.json", b"other"),
        lambda place: place.create("tokenizer/new.json", b"other"),
        lambda place: place.remove("tokenizer/tokenizer.json"),
        lambda place: place.read("tokenizer/tokenizer.json"),
        lambda place: place.n_bytes("tokenizer/tokenizer.json"),
        lambda place: place.names(),
    ):
        with pytest.raises(DamagedStore, match="tokenizer is a link, and no object; put a copy"):
            act(Folder(own))
    assert files_of(outside) == before
    require_refused(own, "tokenizer is a link")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a//b", "a/./b", "", "a/.."])
def test_a_name_leads_below_the_folder_or_nowhere(tmp_path: Path, name: str) -> None:
    for act in (Folder(tmp_path).read, Folder(tmp_path).n_bytes, lambda name: Folder(tmp_path).publish(name, b"")):
        with pytest.raises(DamagedStore, match="is not the name of an object below it"):
            act(name)


# Sizes


def huge_parts(value: dict[str, Any]) -> None:
    value["parts"]["train"].update(n_rows=10**12, shard_rows=1, chunk_rows=1)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (huge_parts, r"train: .* windows and 1,000,000,000,000 rows of"),
        (lambda value: value.update(n_tokens=10**12), "tokens in 1 objects of 1,048,576"),
        (lambda value: value["parts"]["train"].update(n_windows=10**12), "windows and"),
        (lambda value: value["parts"]["train"].update(shard_rows=65), "shards of 65 rows in chunks of 16"),
        (lambda value: value["parts"]["train"].update(shard_rows=0), "Expected `int` >= 1"),
        (lambda value: value["parts"]["train"].update(n_rows=-1), "Expected `int` >= 0"),
        (lambda value: value["parts"]["train"].update(n_rows="64"), "Expected `int`, got `str`"),
        (lambda value: value["parts"]["train"].update(n_rows=1e300), "Expected `int`"),
        (lambda value: value["parts"]["train"].update(n_rows=10**40), "Expected `int`"),
        (lambda value: value["parts"].pop("heldout"), "parts train, not train and heldout"),
        (lambda value: value["parts"].update(other=value["parts"]["train"]), "matching regex"),
        (lambda value: value.update(parts=[]), "Expected `object`, got `array`"),
        (lambda value: value.pop("n_tokens"), "missing required field `n_tokens`"),
        (lambda value: value.update(surprise=1), "unknown field surprise; use the actstore version that wrote it"),
        (lambda value: value["parts"]["train"].update(surprise=1), "unknown field parts.train.surprise"),
        (lambda value: value.update(environment={"a": [[[[[[1]]]]]]}), None),
    ],
)
def test_a_segment_states_sizes_that_its_objects_can_have(own: Path, edit: Edit, match: str | None) -> None:
    forge_store(own, segment=edit)
    if match is None:
        read_all(own)
    else:
        require_refused(own, match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda identity: identity["arrays"][2].update(width=1 << 40), "Expected `int` <="),
        (lambda identity: identity["arrays"][2].update(width="4"), "Expected `int`, got `str`"),
        (lambda identity: identity["arrays"][2].update(dtype="object"), "matching regex"),
        (lambda identity: identity["arrays"][2].update(dtype="float16"), "are not those of a store of activations"),
        (lambda identity: identity["arrays"][2].update(encoding="pickle"), "resid_post.0 is kept as pickle; there are"),
        (lambda identity: identity["arrays"][2].update(name="acts/../../x.0"), "matching regex"),
        (lambda identity: identity["arrays"].pop(0), "are not those of a store of activations"),
        (lambda identity: identity.update(arrays=identity["arrays"][:2]), "are not those of a store of activations"),
        (lambda identity: identity["policy"].update(context=0), "Expected `int` >= 1"),
        (lambda identity: identity["policy"].update(context=10**30), "Expected `int`"),
        (lambda identity: identity["policy"].update(packing="loose"), "matching regex"),
        (lambda identity: identity["policy"].update(new=1), "unknown field policy.new"),
        (lambda identity: identity.update(kind="codes"), "source: Object missing required field"),
        (lambda identity: identity.update(source={"store_id": "x"}), "source: "),
        (lambda identity: identity.update(model=None), "Expected `object`, got `null`"),
        (lambda identity: identity.update(seed=-1), "Expected `int` >= 0"),
    ],
)
def test_a_manifest_states_what_a_store_can_be(own: Path, edit: Edit, match: str) -> None:
    forge_store(own, manifest=lambda value: edit(value["identity"]))
    require_refused(own, match)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda value: value["stats"]["resid_post.0"].update(mean=[0.0]), "is of another shard"),
        (lambda value: value["stats"].pop("resid_post.0"), "is of another shard"),
        (lambda value: value["stats"]["resid_post.0"].update(mean_norm="1"), "Expected `float`, got `str`"),
        (lambda value: value.update(rows=[0]), "Expected `array` of length 2"),
        (lambda value: value.update(rows=[0, 10**9]), "is of another shard"),
        (lambda value: value.update(objects={}), "is of another shard"),
        (lambda value: [entry.update(sha256="0") for entry in value["objects"].values()], "matching regex"),
        (lambda value: [entry.update(bytes=1 << 60) for entry in value["objects"].values()], "Expected `int` <="),
        (lambda value: [entry.update(chunk_crc32c="") for entry in value["objects"].values()], "is of another shard"),
        (lambda value: [entry.pop("chunk_crc32c") for entry in value["objects"].values()], "is of another shard"),
        (lambda value: value.update(surprise=1), "unknown field surprise"),
    ],
)
def test_a_shard_record_states_what_its_shard_can_be(own: Path, edit: Edit, match: str) -> None:
    forge_store(own, shard=edit)
    require_refused(own, match)


@pytest.mark.parametrize("data", NO_RECORDS.values(), ids=NO_RECORDS)
@pytest.mark.parametrize("name", ["manifest.json", "commits/0000/segment.json", "commits/0000/train/000000.json"])
def test_a_record_that_is_no_json_object_is_one_line(own: Path, name: str, data: bytes) -> None:
    forge_store(own)
    (own / name).write_bytes(data)
    require_refused(own, ".")


def test_a_number_that_json_reads_as_infinity_is_a_change(own: Path) -> None:
    file = own / "commits/0000/train/000000.json"
    text = file.read_text()
    mean_norm = json.loads(text)["stats"]["resid_post.0"]["mean_norm"]
    forge_store(own)
    file.write_text(text.replace(repr(mean_norm), "1e999"))
    require_refused(own, "not readable as JSON")


# Chunks


@pytest.mark.parametrize("n_unpacked", [0, 60, 68, 1 << 30])
def test_a_chunk_unpacks_to_its_own_length_or_not_at_all(n_unpacked: int) -> None:
    """Blosc fills what it has; the rest of the memory would be whatever was there before."""
    data = bytearray(blosc.compress(bytes(64), b"zstd", 1, 1))
    data[4:8] = struct.pack("<I", n_unpacked)
    with pytest.raises(Unreadable, match=f"to be unpacked to 64, says {len(data)} and {n_unpacked:,}"):
        unpack_chunk(np.frombuffer(data, np.uint8), np.empty(64, np.uint8))


def test_a_shard_whose_chunk_is_short_is_refused_though_every_hash_matches(own: Path) -> None:
    name = paths.shard_object(0, "train", "acts/resid_post.1", 0, 2)
    old = (own / name).read_bytes()
    chunk = bytes(blosc.compress(bytes(16), b"zstd", 1, 1))
    chunk += int(google_crc32c.value(chunk)).to_bytes(4, "little")
    n_chunks = 64 // 16
    index = struct.pack("<" + "QQ" * n_chunks, *[n for i in range(n_chunks) for n in (i * len(chunk), len(chunk))])
    index += int(google_crc32c.value(index)).to_bytes(4, "little")
    forge_object(own, name, chunk * n_chunks + index)
    assert len(old) != len(chunk) * n_chunks + len(index)
    forge(
        own / "commits/0000/train/000000.json",
        lambda value: value["objects"][name].update(chunk_crc32c=chunk[-4:].hex() * n_chunks),
    )
    store = ActivationStore(own)
    with pytest.raises(DamagedStore, match="to be unpacked to 128, says"):
        store.read(store.shards()[0], "acts/resid_post.1")


@pytest.mark.parametrize("n_bytes", [0, 3, 20])
def test_an_object_too_short_for_its_index_is_refused(own: Path, n_bytes: int) -> None:
    name = paths.shard_object(0, "train", "acts/resid_post.0", 0, 2)
    forge_object(own, name, bytes(n_bytes))
    require_refused(own, "acts/resid_post.0")


def test_an_index_that_leads_out_of_its_object_is_refused(own: Path) -> None:
    name = paths.shard_object(0, "train", "acts/resid_post.0", 0, 2)
    data = (own / name).read_bytes()
    index = struct.pack("<QQ", 1 << 62, 260) + data[-64 + 12 : -4]
    index += int(google_crc32c.value(index)).to_bytes(4, "little")
    forge_object(own, name, data[: -len(index)] + index)
    require_refused(own, "its index names a chunk of 260 bytes at")
