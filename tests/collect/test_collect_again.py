"""A store is finished, extended and mended by running the command again, and what was committed is never touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import faults_in, folder_state
from rowkit import assert_each_kept_token_is_one_row, assert_rows_are_the_models, documents_in
from safetensors.torch import load_file, save_file
from storekit import files_of
from transformers import GPT2LMHeadModel

from actstore.errors import DamagedStore, IdentityMismatch, NoSpace
from actstore.integrity import repair
from actstore.open_place import open_place
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.collect import stage as stage
from pipelines.collect.collection import Collection
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect

# Running it again


def test_the_same_command_again_writes_nothing(own_store: Path, small_config: CollectConfig) -> None:
    before = folder_state(own_store)
    again = collect(replace(small_config, out=own_store))
    assert folder_state(own_store) == before
    assert again["shards_committed_before"] == again["shards"] > 8
    fewer = collect(replace(small_config, out=own_store, tokens=10))
    assert fewer["tokens"] == 1500
    assert folder_state(own_store) == before


def test_a_shards_bytes_do_not_depend_on_what_was_computed_before_it(
    own_store: Path, small_store: Path, small_config: CollectConfig
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    for part, shard in (("train", 1), ("train", 4), ("train", 5), ("heldout", 0)):
        (own_store / f"commits/0000/{part}/{shard:06d}.json").unlink()
        arrays = own_store / "data.zarr/segments/0000" / part
        if shard != 4:  # whose objects are left there whole
            (arrays / f"rows/window/c/{shard}").unlink()
            (arrays / f"acts/resid_post.0/c/{shard}/0").write_bytes(b"half a shard")
    result = collect(replace(small_config, out=own_store))
    assert result["shards"] - result["shards_committed_before"] == 4
    assert files_of(own_store) == files_of(small_store)


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_the_number_of_threads_changes_no_bit(compute_dtype: str, small_config: CollectConfig, tmp_path: Path) -> None:
    n_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            collect(replace(small_config, out=tmp_path / str(threads), compute_dtype=compute_dtype, layer=(0, 2)))
    finally:
        torch.set_num_threads(n_threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_more_tokens_are_a_new_segment_and_the_first_is_not_touched(
    own_store: Path, small_config: CollectConfig, reference: GPT2LMHeadModel, texts: Path
) -> None:
    before = folder_state(own_store)
    assert collect(replace(small_config, out=own_store, tokens=2200))["tokens"] == 2200
    # A piece of one document alone: its segment has an empty split.
    assert collect(replace(small_config, out=own_store, tokens=2205))["tokens"] == 2205
    files = {name for name in before if (own_store / name).is_file()}
    after = folder_state(own_store)
    assert {name: after[name] for name in files} == {name: before[name] for name in files}
    store = ActivationStore(own_store)
    assert [segment.n_tokens for segment in store.segments] == [1500, 700, 5]
    begins = [(segment.first_document, segment.first_token) for segment in store.segments]
    ends = [(segment.next_document, segment.next_token) for segment in store.segments]
    assert begins == [(0, 0), *ends[:-1]], "each begins where the one before it ends"
    assert all(token > 0 for _, token in ends), "no end of these is an end of a document"
    assert len({segment.heldout_modulus for segment in store.segments}) == 1
    assert_rows_are_the_models(own_store, reference)
    assert_each_kept_token_is_one_row(own_store)

    everything = collect(replace(small_config, out=own_store, tokens=10**6))
    assert everything["corpus_exhausted"]
    assert documents_in(own_store) == {file.name: file.read_bytes() for file in texts.glob("*.txt")}
    state = folder_state(own_store)
    again = collect(replace(small_config, out=own_store, tokens=10**6))
    assert again["added"]["documents"] == 0
    assert {**again, "added": everything["added"]} == {**everything, "shards_committed_before": everything["shards"]}
    assert folder_state(own_store) == state


def test_a_large_corpus_becomes_several_segments(
    small_config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SEGMENT_TOKENS", 500)
    result = collect(replace(small_config, out=tmp_path / "store", tokens=1200))
    assert result["tokens"] == 1200
    assert [segment.n_tokens for segment in ActivationStore(tmp_path / "store").segments] == [500, 500, 200]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"context": 16}, "policy.context: 32 / 16"),
        ({"seed": 1}, "seed: 0 / 1"),
        ({"encoding": "fp16"}, r"arrays: .*float32.* / .*float16"),
        ({"layer": (0, 1)}, r"arrays: .*resid_post\.0.* / .*resid_post\.1"),
        ({"packing": "document"}, "policy.packing: packed / document"),
        ({"bos": False}, "policy.bos: True / False"),
        ({"keep_special": True}, "policy.keep_special: False / True"),
        ({"compute_dtype": "bf16"}, "compute_dtype: fp32 / bf16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_identity_is_refused_and_its_fields_are_named(
    change: dict[str, Any], field: str, own_store: Path, small_config: CollectConfig
) -> None:
    before = folder_state(own_store)
    with pytest.raises(IdentityMismatch, match=field):
        collect(replace(small_config, out=own_store, **change))
    assert folder_state(own_store) == before


def test_another_text_or_model_is_another_identity(
    own_store: Path, small_config: CollectConfig, texts: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    assert collect(replace(small_config, out=own_store, model=str(tmp_path / "model")))["tokens"] == 1500, "the same, moved"
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["transformer.h.0.ln_1.bias"][0] += 1
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IdentityMismatch, match=r"model\.weights_sha256"):
        collect(replace(small_config, out=own_store, model=str(tmp_path / "model")))
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts/story00.txt").write_text("Another story.\n")
    with pytest.raises(IdentityMismatch, match=r"corpus\.fingerprint"):
        collect(replace(small_config, out=own_store, corpus=str(tmp_path / "texts")))


def test_hardware_that_computes_other_bits_is_refused_unless_accepted(
    own_store: Path, small_config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000002.json").unlink()
    before = folder_state(own_store)
    monkeypatch.setattr(Collection, "probe", lambda collection, windows: "00000000")
    with pytest.raises(IdentityMismatch, match=r"here it is 00000000; .*--mixed-hardware"):
        collect(replace(small_config, out=own_store))
    assert folder_state(own_store) == before
    collect(replace(small_config, out=own_store, mixed_hardware=True))
    assert faults_in(own_store) == []
    assert json.loads((own_store / "commits/0000/mixed-00000000.json").read_text())["probe_crc32c"] == "00000000"
    probes = {
        shard.index: ActivationStore(own_store).notes(shard)["probe_crc32c"] for shard in ActivationStore(own_store).shards()
    }
    assert [shard for shard, probe in probes.items() if probe == "00000000"] == [2]


def test_continuing_asks_for_the_space_of_what_is_missing(
    own_store: Path, small_config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000002.json").unlink()
    before = folder_state(own_store)
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: 64 << 20)
    with pytest.raises(NoSpace, match="133 rows needs"):
        collect(replace(small_config, out=own_store))
    assert folder_state(own_store) == before


# Growing


@pytest.mark.parametrize("steps", [(1, 2, 61, 700), (333, 999, 1000)], ids=str)
def test_wherever_segments_were_cut_their_texts_together_are_the_corpus(
    steps: tuple[int, ...], small_config: CollectConfig, texts: Path, tmp_path: Path
) -> None:
    for n_tokens in (*steps, 10**6):
        collect(replace(small_config, out=tmp_path / "store", tokens=n_tokens))
    assert len(ActivationStore(tmp_path / "store").segments) == len(steps) + 1
    assert documents_in(tmp_path / "store") == {file.name: file.read_bytes() for file in texts.glob("*.txt")}
    assert_each_kept_token_is_one_row(tmp_path / "store")
    assert faults_in(tmp_path / "store") == []


@pytest.fixture(scope="module")
def grown_config(small_config: CollectConfig) -> CollectConfig:
    return replace(small_config, encoding="int8", layer=(0, 1))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, grown_config: CollectConfig) -> Path:
    """An int8 store of two segments, cut inside a document. Read-only."""
    out = tmp_path_factory.mktemp("grown") / "store"
    collect(replace(grown_config, out=out, tokens=700))
    collect(replace(grown_config, out=out))
    return out


def test_int8_measures_each_segment_by_its_own_rows_and_an_earlier_one_as_before(
    grown: Path, grown_config: CollectConfig, tmp_path: Path
) -> None:
    collect(replace(grown_config, out=tmp_path / "first", tokens=700))
    for n_tokens in (700, 1500):
        collect(replace(grown_config, out=tmp_path / "exact", tokens=n_tokens, encoding="fp32"))
    store, exact = ActivationStore(grown), ActivationStore(tmp_path / "exact")
    for site in store.sites:
        tables = [store.channels(segment, f"acts/{site}") for segment in (0, 1)]
        before = ActivationStore(tmp_path / "first").channels(0, f"acts/{site}")
        np.testing.assert_array_equal(tables[0].table, before.table)
        for segment, found in enumerate(tables):
            shards = [shard for shard in exact.shards() if shard.segment == segment]
            rows = np.concatenate([exact.read(shard, f"acts/{site}") for shard in shards])
            np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.deviation, rows.std(axis=0), rtol=1e-3)
        assert (tables[0].table != tables[1].table).all()


def test_who_reads_an_older_snapshot_sees_the_same_rows_while_the_store_grows(
    own_store: Path, small_config: CollectConfig
) -> None:
    opened = ActivationStore(own_store)
    expected = list(BatchStream(opened, "resid_post.0", 100, epochs=1))
    batches = iter(BatchStream(opened, "resid_post.0", 100, epochs=1))
    found = [next(batches) for _ in range(3)]
    collect(replace(small_config, out=own_store, tokens=2200))
    found += batches
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert opened.n_rows() < ActivationStore(own_store).n_rows()
    again = ActivationStore(own_store, snapshot=opened.snapshot)
    assert again.shards() == opened.shards()
    assert again.n_rows("heldout") == opened.n_rows("heldout")


# Mending


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "tokens/ids/c/0",
        "tokens/ids/zarr.json",
        "documents/source/c/0",
        "train/windows/first_row/c/0",
        "heldout/windows/n_tokens/c/0",
        "channels/resid_post.1/c/0/0",
        "train/acts/resid_post.0/zarr.json",
    ],
)
def test_a_lost_table_is_made_again_and_no_row_is_computed(
    name: str, grown: Path, grown_config: CollectConfig, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(grown, tmp_path / "store"))
    for segment in ("0000", "0001"):
        (own / "data.zarr/segments" / segment / name).unlink()
    before = {file: file.stat().st_mtime_ns for file in own.rglob("*") if file.is_file()}
    result = collect(replace(grown_config, out=own))
    assert result["shards_committed_before"] == result["shards"]
    assert files_of(own) == files_of(grown)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_lost_table_is_made_again_on_hardware_of_other_bits_unless_it_depends_on_them(
    grown: Path, grown_config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(grown, tmp_path / "store"))
    channels = Collection.channels
    monkeypatch.setattr(
        Collection,
        "channels",
        lambda collection, plan: {
            site: replace(found, mean=np.nextafter(found.mean, np.float32(1e9)))
            for site, found in channels(collection, plan).items()
        },
    )
    (own / "data.zarr/segments/0001/tokens/ids/c/0").unlink()
    collect(replace(grown_config, out=own))
    assert files_of(own) == files_of(grown)
    (own / "data.zarr/segments/0001/channels/resid_post.0/c/0/0").unlink()
    with pytest.raises(DamagedStore, match=r"channels/resid_post\.0/c/0/0 cannot be made again"):
        collect(replace(grown_config, out=own))


def test_a_lost_record_of_a_finished_segment_is_not_taken_for_work_to_do(
    own_store: Path, small_config: CollectConfig
) -> None:
    (own_store / "commits/0000/train/000003.json").unlink()
    before = folder_state(own_store)
    with pytest.raises(DamagedStore, match=r"commit record of train shard 3 is missing; `actstore repair` drops what is"):
        collect(replace(small_config, out=own_store))
    assert folder_state(own_store) == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "data.zarr/segments/0001/train/acts/resid_post.0/c/1/0",
        "data.zarr/segments/0000/train/scales/resid_post.1/c/0",
        "data.zarr/segments/0000/heldout/rows/window/c/0",
        "data.zarr/segments/0001/tokens/ids/c/0",
        "data.zarr/segments/0000/channels/resid_post.0/c/0/0",
        "commits/0001/train/000002.json",
        "commits/0001/segment.json",
        "commits/0000/sealed.json",
        "tokenizer/tokenizer.json",
        "manifest.json",
    ],
)
def test_repair_and_collect_restore_the_identical_bytes(
    name: str, harm: Callable[[Path], None], grown: Path, grown_config: CollectConfig, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(grown, tmp_path / "store"))
    harm(own / name)
    assert any(name in fault for fault in faults_in(own))
    done = repair(open_place(own))
    n_computed = len(done.shards)
    assert n_computed == (1 if "/c/" in name and "tokens" not in name and "channels" not in name else "00000" in name)
    result = collect(replace(grown_config, out=own))
    assert result["shards"] - result["shards_committed_before"] == n_computed
    assert files_of(own) == files_of(grown)
    assert faults_in(own) == []


@pytest.mark.parametrize("name", ["commits/0000/segment.json", "commits/0000/train/000002.json", "manifest.json"])
def test_repair_and_collect_restore_what_was_not_sealed_yet(
    name: str, own_store: Path, small_store: Path, small_config: CollectConfig
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000004.json").unlink()
    flip(own_store / name)
    repair(open_place(own_store))
    collect(replace(small_config, out=own_store))
    assert files_of(own_store) == files_of(small_store)


def test_without_its_manifest_a_store_is_not_taken_for_another(
    own_store: Path, small_store: Path, small_config: CollectConfig
) -> None:
    (own_store / "manifest.json").unlink()
    before = folder_state(own_store)
    for change in ({"seed": 1}, {"encoding": "fp16"}, {"layer": (1,)}, {"context": 16}):
        with pytest.raises(IdentityMismatch, match="its manifest is missing, and its records are of store"):
            collect(replace(small_config, out=own_store, **change))
        assert folder_state(own_store) == before
    collect(replace(small_config, out=own_store))
    assert files_of(own_store) == files_of(small_store)


def test_a_store_without_its_manifest_is_extended_from_where_it_ends(
    own_store: Path, small_config: CollectConfig, texts: Path
) -> None:
    (own_store / "manifest.json").unlink()
    assert collect(replace(small_config, out=own_store, tokens=2200))["tokens"] == 2200
    collect(replace(small_config, out=own_store, tokens=10**6))
    assert documents_in(own_store) == {file.name: file.read_bytes() for file in texts.glob("*.txt")}


def test_a_lost_first_segment_is_made_again_of_as_many_tokens_or_not_at_all(
    own_store: Path, small_store: Path, small_config: CollectConfig
) -> None:
    """Neither sealed nor recorded, its shards still say which text they are of."""
    for name in ("sealed.json", "segment.json"):
        (own_store / "commits/0000" / name).unlink()
    before = files_of(own_store)
    with pytest.raises(IdentityMismatch, match="segment 0 has shards of other text; ask for as many --tokens as when"):
        collect(replace(small_config, out=own_store, tokens=1400))
    assert files_of(own_store) == before
    written = {file: file.stat().st_mtime_ns for file in own_store.rglob("c/*") if file.is_file()}
    collect(replace(small_config, out=own_store))
    assert files_of(own_store) == files_of(small_store)
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_a_tokenizer_file_that_cannot_be_made_again_is_named(
    own_store: Path, small_config: CollectConfig, model_folder: Path, tmp_path: Path
) -> None:
    """As with a later version of its library, which writes the file in another way."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    asked = replace(small_config, out=own_store, model=str(model))
    assert collect(asked)["tokens"] == 1500, "the one that is there is kept"
    (own_store / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(DamagedStore, match=r"tokenizer_config\.json is not as it was committed and cannot be made again"):
        collect(asked)


def test_what_an_attempt_that_ended_before_its_manifest_left_is_not_taken_over(
    small_store: Path, small_config: CollectConfig, tmp_path: Path
) -> None:
    """As when the first attempt named another model."""
    out = tmp_path / "store"
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer/tokenizer.json").write_text("another model's")
    (out / "tokenizer/merges.txt").write_text("another model's")
    (out / "lock").touch()
    (out / ".manifest.json.0a1b2c3d.tmp").write_text("half")
    collect(replace(small_config, out=out))
    assert files_of(out) == files_of(small_store)
