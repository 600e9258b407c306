"""Each stored row is what the model computes for its token, in whatever order and after however many interruptions."""

from __future__ import annotations

import multiprocessing
import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import collect_and_die, folder_state
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from actstore.errors import EncodingError, IdentityMismatch, InputError, NoSpace
from actstore.reader import ActivationStore
from actstore.schema import PARTS, WindowPolicy
from pipelines import collect as stage
from pipelines.collect import CollectConfig, collect
from pipelines.tokens import store_tokenizer

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes of their own that start fast: the stage is imported once, in the server they are forked from."""
PROCESSES.set_forkserver_preload(["modelkit", "pipelines.collect", "zarr.codecs", "transformers.models.gpt2.modeling_gpt2"])


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> GPT2LMHeadModel:
    """The model as transformers loads it."""
    return GPT2LMHeadModel.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def config(model_folder: Path, texts: Path) -> CollectConfig:
    """What the tests of this file collect, each at its own `out`: one layer, in float32."""
    return CollectConfig(
        out=Path("unset"), model=str(model_folder), corpus=str(texts), layer=(0,), tokens=1500, context=32, encoding="fp32"
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, config: CollectConfig) -> Path:
    """The store that `config` describes. Read-only."""
    out = tmp_path_factory.mktemp("small") / "store"
    collect(replace(config, out=out))
    return out


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy of `small` to change."""
    return Path(shutil.copytree(small, tmp_path / "store"))


def files_of(store: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in folder_state(store).items() if (store / name).is_file()}


def stored_rows(store: ActivationStore, part: str, name: str) -> dict[int, NDArray[Any]]:
    """Rows of an array by segment, in the order of the shards."""
    return {
        segment.index: np.concatenate(
            [store.read(shard, name) for shard in store.shards(part) if shard.segment == segment.index]
        )
        for segment in store.segments
        if segment.parts[part].n_rows
    }


def all_windows(store: ActivationStore, segment: int, part: str) -> NDArray[np.int64]:
    """(n_windows, context) what the model sees, rebuilt from the store's own tables."""
    policy = store.manifest.policy
    ids = store.table(segment, "tokens/ids").astype(np.int64)
    starts, counts = (store.table(segment, f"{part}/windows/{name}") for name in ("token_start", "n_tokens"))
    rows = []
    for start, n_tokens in zip(starts, counts.astype(int), strict=True):
        real = [policy.bos_token_id] * policy.bos + ids[start : start + n_tokens].tolist()
        rows.append(real + [policy.separator_token_id] * (policy.context - len(real)))
    return np.array(rows)


def kept_pairs(windows: NDArray[np.int64], n_tokens: NDArray[Any], policy: WindowPolicy) -> list[tuple[int, int]]:
    """Every (window, position) that the policy keeps."""
    return [
        (window, position)
        for window, n in enumerate(n_tokens.astype(int) + policy.bos)
        for position in range(n)
        if policy.keep_special or (position and windows[window, position] != policy.separator_token_id)
    ]


def assert_rows_are_the_models(path: Path, reference: GPT2LMHeadModel, ulp: float = 0.0) -> None:
    """Compare every row of a store with transformers' hidden states, to 1e-5 of the largest and `ulp` of the value."""
    store = ActivationStore(path)
    for part in PARTS:
        windows, positions = (stored_rows(store, part, f"rows/{name}") for name in ("window", "position"))
        for segment, window in windows.items():
            inputs = torch.from_numpy(all_windows(store, segment, part))
            with torch.inference_mode():
                hidden = reference(inputs, output_hidden_states=True).hidden_states
            for site in store.sites:
                layer = int(site.removeprefix("resid_post."))
                rows = torch.from_numpy(stored_rows(store, part, f"acts/{site}")[segment])
                if layer == len(hidden) - 2:  # transformers' last hidden state is behind the final LayerNorm
                    with torch.inference_mode():
                        rows = reference.transformer.ln_f(rows)
                expected = hidden[layer + 1].numpy()[window, positions[segment]]
                allowed = 1e-5 * np.abs(expected).max() + ulp * np.exp2(np.floor(np.log2(np.abs(expected))))
                assert (np.abs(rows.numpy() - expected) <= allowed).all()


# Rows


def test_every_row_is_what_transformers_computes_for_its_window_and_position(
    store: Path, reference: GPT2LMHeadModel
) -> None:
    assert ActivationStore(store).sites == ["resid_post.0", "resid_post.2"]
    assert_rows_are_the_models(store, reference)


@pytest.mark.parametrize(("encoding", "mantissa_bits"), [("fp16", 10), ("bf16", 7)])
def test_a_row_in_half_precision_is_rounded_by_half_an_ulp(
    encoding: str, mantissa_bits: int, config: CollectConfig, reference: GPT2LMHeadModel, tmp_path: Path
) -> None:
    collect(replace(config, out=tmp_path / "store", encoding=encoding, tokens=600))
    assert_rows_are_the_models(tmp_path / "store", reference, ulp=2.0 ** -(mantissa_bits + 1))


@pytest.mark.parametrize(
    "policy",
    [
        {"bos": False},
        {"keep_special": True},
        {"packing": "document"},
        {"packing": "document", "bos": False, "keep_special": True, "batch_windows": 5},
    ],
    ids=str,
)
def test_rows_are_the_models_under_every_policy(
    policy: dict[str, Any], config: CollectConfig, reference: GPT2LMHeadModel, tmp_path: Path
) -> None:
    collect(replace(config, out=tmp_path / "store", tokens=700, **policy))
    assert_rows_are_the_models(tmp_path / "store", reference)
    assert_each_kept_token_is_one_row(tmp_path / "store")


def assert_each_kept_token_is_one_row(path: Path) -> None:
    store = ActivationStore(path)
    for part in PARTS:
        windows, positions = (stored_rows(store, part, f"rows/{name}") for name in ("window", "position"))
        for segment, window in windows.items():
            pairs = sorted(zip(window.tolist(), positions[segment].tolist(), strict=True))
            n_tokens = store.table(segment, f"{part}/windows/n_tokens")
            assert pairs == kept_pairs(all_windows(store, segment, part), n_tokens, store.manifest.policy)


def test_every_kept_token_is_exactly_one_row(store: Path) -> None:
    assert_each_kept_token_is_one_row(store)
    opened = ActivationStore(store)
    (segment,) = opened.segments
    n_kept = (opened.table(0, "tokens/ids") != opened.manifest.policy.separator_token_id).sum()
    assert sum(opened.n_rows(part) for part in PARTS) == n_kept == segment.n_tokens
    assert opened.n_rows("heldout") > 0


def test_rows_are_shuffled_over_the_corpus(store: Path) -> None:
    opened = ActivationStore(store)
    shard = opened.shards()[0]
    places = np.searchsorted(opened.table(0, "documents/offsets"), opened.token_index(shard), side="right")
    assert len(np.unique(places)) > 2
    assert (np.diff(opened.read(shard, "rows/window").astype(int)) < 0).any()


def test_a_row_leads_back_to_its_token_its_document_and_the_text(store: Path, texts: Path) -> None:
    opened = ActivationStore(store)
    policy = opened.manifest.policy
    codec = store_tokenizer(store, policy.bos_token_id, policy.separator_token_id)
    ids, offsets, names = opened.table(0, "tokens/ids"), opened.table(0, "documents/offsets"), opened.document_names(0)
    pieces = codec.token_bytes()
    for part in PARTS:
        for shard in opened.shards(part):
            index = opened.token_index(shard)
            np.testing.assert_array_equal(opened.token_ids(shard), ids[index])
            for token in index[:5]:
                document = int(np.searchsorted(offsets, token, side="right")) - 1
                assert opened.table(0, "documents/heldout")[document] == (part == "heldout")
                before = b"".join(pieces[i] for i in ids[offsets[document] : token])
                source = (texts / names[document]).read_bytes()
                assert source.startswith(before + pieces[ids[token]])
    for document, name in enumerate(names):
        assert codec.text(ids[offsets[document] : offsets[document + 1] - 1]) == (texts / name).read_text(encoding="utf-8")


def test_moments_in_the_records_equal_numpys(store: Path) -> None:
    opened = ActivationStore(store)
    for part in PARTS:
        for site in opened.sites:
            rows = stored_rows(opened, part, f"acts/{site}")[0].astype(np.float64)
            n_rows, mean, second = opened.moments(site, part)
            assert n_rows == len(rows)
            np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(second, np.square(rows).mean(axis=0), rtol=1e-9, atol=1e-9)


# Continuing


def test_the_same_command_again_writes_nothing(own: Path, config: CollectConfig) -> None:
    before = folder_state(own)
    again = collect(replace(config, out=own))
    assert folder_state(own) == before
    assert again["shards_committed_before"] == again["shards"] > 10
    fewer = collect(replace(config, out=own, tokens=10))
    assert fewer["tokens"] == 1500
    assert folder_state(own) == before


def test_killed_three_times_and_continued_the_store_is_bit_identical(
    small: Path, config: CollectConfig, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    moments = random.Random(0)
    n_committed = [0]
    # A whole run does about 1,200 things to files: 580 until the first segment is published, then 44 for each shard.
    for earliest, latest in ((1, 580), (600, 780), (100, 300)):
        process = PROCESSES.Process(
            target=collect_and_die, args=(replace(config, out=out), moments.randint(earliest, latest))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        n_committed.append(len(list(out.glob("commits/**/*.json"))))
        if (out / "manifest.json").exists():
            assert ActivationStore(out, partial=True).verify() == []
    assert n_committed == sorted(n_committed)
    result = collect(replace(config, out=out))
    assert 0 < result["shards_committed_before"] < result["shards"]
    assert files_of(out) == files_of(small)


def test_a_shards_bytes_do_not_depend_on_what_was_computed_before_it(own: Path, small: Path, config: CollectConfig) -> None:
    (own / "commits/0000/sealed.json").unlink()
    for part, shard in (("train", 1), ("train", 4), ("train", 5), ("heldout", 0)):
        (own / f"commits/0000/{part}/{shard:06d}.json").unlink()
        arrays = own / "data.zarr/segments/0000" / part
        if shard != 4:  # whose objects are left there whole
            (arrays / f"rows/window/c/{shard}").unlink()
            (arrays / f"acts/resid_post.0/c/{shard}/0").write_bytes(b"half a shard")
    result = collect(replace(config, out=own))
    assert result["shards"] - result["shards_committed_before"] == 4
    assert files_of(own) == files_of(small)


def test_more_tokens_are_a_new_segment_and_the_first_is_not_touched(
    own: Path, config: CollectConfig, reference: GPT2LMHeadModel, texts: Path
) -> None:
    before = folder_state(own)
    assert collect(replace(config, out=own, tokens=2200))["tokens"] == 2200
    # One more document alone: its segment has an empty split.
    assert collect(replace(config, out=own, tokens=2205))["tokens"] == 2205
    files = {name for name in before if (own / name).is_file()}
    after = folder_state(own)
    assert {name: after[name] for name in files} == {name: before[name] for name in files}
    store = ActivationStore(own)
    assert [segment.n_tokens for segment in store.segments] == [1500, 700, 5]
    assert [segment.first_document for segment in store.segments] == [
        0,
        store.segments[0].n_documents,
        store.segments[0].n_documents + store.segments[1].n_documents,
    ]
    assert len({segment.heldout_modulus for segment in store.segments}) == 1
    names = [name for segment in store.segments for name in store.document_names(segment.index)]
    assert len(names) == len(set(names)), "no document is in two segments"
    assert_rows_are_the_models(own, reference)
    assert_each_kept_token_is_one_row(own)

    everything = collect(replace(config, out=own, tokens=10**6))
    assert everything["corpus_exhausted"]
    names = [name for segment in ActivationStore(own).segments for name in store_names(own, segment.index)]
    assert sorted(names) == sorted(file.name for file in texts.glob("*.txt"))
    state = folder_state(own)
    assert collect(replace(config, out=own, tokens=10**6)) == {
        **everything,
        "shards_committed_before": everything["shards"],
    }
    assert folder_state(own) == state


def store_names(path: Path, segment: int) -> list[str]:
    return ActivationStore(path).document_names(segment)


def test_a_large_corpus_becomes_several_segments(
    config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SEGMENT_TOKENS", 500)
    result = collect(replace(config, out=tmp_path / "store", tokens=1200))
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
    change: dict[str, Any], field: str, own: Path, config: CollectConfig
) -> None:
    before = folder_state(own)
    with pytest.raises(IdentityMismatch, match=field):
        collect(replace(config, out=own, **change))
    assert folder_state(own) == before


def test_another_text_or_model_is_another_identity(
    own: Path, config: CollectConfig, texts: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    assert collect(replace(config, out=own, model=str(tmp_path / "model")))["tokens"] == 1500, "the same, moved"
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["transformer.h.0.ln_1.bias"][0] += 1
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IdentityMismatch, match=r"model\.weights_sha256"):
        collect(replace(config, out=own, model=str(tmp_path / "model")))
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts/story00.txt").write_text("Another story.\n")
    with pytest.raises(IdentityMismatch, match=r"corpus\.fingerprint"):
        collect(replace(config, out=own, corpus=str(tmp_path / "texts")))


def test_hardware_that_computes_other_bits_is_refused_unless_accepted(
    own: Path, config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "commits/0000/sealed.json").unlink()
    (own / "commits/0000/train/000002.json").unlink()
    before = folder_state(own)
    monkeypatch.setattr(stage._Run, "_probe", lambda run, windows: "00000000")
    with pytest.raises(IdentityMismatch, match=r"here it is 00000000; .*--mixed-hardware"):
        collect(replace(config, out=own))
    assert folder_state(own) == before
    collect(replace(config, out=own, mixed_hardware=True))
    assert ActivationStore(own).verify() == []


def test_continuing_asks_for_the_space_of_what_is_missing(
    own: Path, config: CollectConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "commits/0000/sealed.json").unlink()
    (own / "commits/0000/train/000002.json").unlink()
    before = folder_state(own)
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: 64 << 20)
    with pytest.raises(NoSpace, match="128 rows needs"):
        collect(replace(config, out=own))
    assert folder_state(own) == before


# What cannot be kept, or computed


def test_a_value_beyond_fp16_stops_with_its_site_token_position_and_value(
    config: CollectConfig, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """One token's embedding is made too large: the message must lead to a place where that token stands."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    token = Tokenizer.from_file(str(model / "tokenizer.json")).encode(" owl", add_special_tokens=False).ids[0]
    weights = load_file(model / "model.safetensors")
    weights["transformer.wte.weight"][token, 5] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    asked = replace(config, out=tmp_path / "store", model=str(model), site=("resid_pre",), encoding="fp16")
    with pytest.raises(EncodingError) as caught:
        collect(asked)
    message = str(caught.value)
    assert "does not fit fp16; bf16 keeps up to 3.39e38, fp32 any finite value." in message
    found = re.match(
        r"resid_pre\.0: token (\d+) of the table, position (\d+) of its window: value (\S+) at .* channel 5 ", message
    )
    assert found
    assert float(found[3]) == pytest.approx(1e5, rel=1e-3)
    index, position = int(found[1]), int(found[2])
    store = ActivationStore(tmp_path / "store", partial=True)
    assert store.table(0, "tokens/ids")[index] == token
    assert index - position + 1 in [start for part in PARTS for start in store.table(0, f"{part}/windows/token_start")]
    assert collect(replace(asked, out=tmp_path / "wide", encoding="bf16"))["tokens"] == 1500


def test_a_context_above_the_models_positions_is_refused(config: CollectConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context 65: the model has 64 positions; choose --context 64 or less"):
        collect(replace(config, out=tmp_path / "store", context=65))
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_with_tokens_the_model_has_not_is_refused(
    config: CollectConfig, model_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(100)])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError, match=r"its tokenizer has \d+ tokens, the model knows \d+"):
        collect(replace(config, out=tmp_path / "store", model=str(model)))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"context": 1},
        {"batch_windows": 0},
        {"encoding": "int4"},
        {"compute_dtype": "fp8"},
        {"packing": "loose"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(wrong: dict[str, Any], config: CollectConfig) -> None:
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        replace(config, **wrong)
