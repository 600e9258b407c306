"""Each stored row is what the model computes for its token, kept as its encoding says; what cannot be kept stops it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import END_OF_TEXT, faults_in
from rowkit import assert_each_kept_token_is_one_row, assert_rows_are_the_models, stored_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.encodings.int8 import STEPS
from actstore.errors import EncodingError, InputError
from actstore.reader import ActivationStore
from actstore.recode import recode_store
from actstore.schema import PARTS
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.text.tokenizer_files import store_tokenizer

# Rows


def test_every_row_is_what_transformers_computes_for_its_window_and_position(
    store: Path, reference: GPT2LMHeadModel
) -> None:
    assert ActivationStore(store).sites == ["resid_post.0", "resid_post.2"]
    assert_rows_are_the_models(store, reference)


@pytest.mark.parametrize(("encoding", "mantissa_bits"), [("fp16", 10), ("bf16", 7)])
def test_a_row_in_half_precision_is_rounded_by_half_an_ulp(
    encoding: str, mantissa_bits: int, small_config: CollectConfig, reference: GPT2LMHeadModel, tmp_path: Path
) -> None:
    collect(replace(small_config, out=tmp_path / "store", encoding=encoding, tokens=600))
    assert_rows_are_the_models(tmp_path / "store", reference, ulp=2.0 ** -(mantissa_bits + 1))


def test_an_int8_row_is_that_of_fp32_to_half_a_step_of_its_own_scale(
    small_store: Path, small_config: CollectConfig, tmp_path: Path
) -> None:
    """A step is scale x deviation of the channel; the largest deviation of a row is at most 127 steps."""
    collect(replace(small_config, out=tmp_path / "store", encoding="int8"))
    exact, kept = ActivationStore(small_store), ActivationStore(tmp_path / "store")
    name = "acts/resid_post.0"
    channels = kept.channels(0, name)
    train = np.concatenate([exact.read(shard, name) for shard in exact.shards()])
    np.testing.assert_allclose(channels.mean, train.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(channels.deviation, train.std(axis=0), rtol=1e-4)
    missed = 0.0
    for part in PARTS:
        for ours, theirs in zip(kept.shards(part), exact.shards(part), strict=True):
            for column in ("rows/window", "rows/position"):
                np.testing.assert_array_equal(kept.read(ours, column), exact.read(theirs, column))
            expected, found = exact.read(theirs, name), kept.read(ours, name)
            scale = kept.read(ours, "scales/resid_post.0")[:, None]
            largest = np.abs((expected - channels.mean) / channels.deviation).max(axis=1, keepdims=True)
            assert (largest <= scale * STEPS * (1 + 1e-6)).all()
            allowed = 0.5 * scale * channels.deviation + 1e-6 * np.abs(expected).max()
            assert (np.abs(found - expected) <= allowed).all()
            missed += np.square(found.astype(float) - expected).sum()
            assert kept.notes(ours)["stats"] == exact.notes(theirs)["stats"], "statistics are of the rows the model gave"
    every = np.concatenate([stored_rows(exact, part, name)[0] for part in PARTS]).astype(float)
    assert missed / np.square(every - every.mean(axis=0)).sum() < 2e-4


def test_what_bf16_compute_does_to_rows_is_recorded_as_an_independent_measurement_finds_it(
    small_config: CollectConfig, model_folder: Path, tmp_path: Path
) -> None:
    collect(replace(small_config, out=tmp_path / "store", compute_dtype="bf16", layer=(0, 1)))
    store = ActivationStore(tmp_path / "store")
    recorded = store.segments[0].environment["unexplained_by_compute_dtype"]
    assert set(recorded) == {"resid_post.0", "resid_post.1"}
    config = GPT2Config.from_pretrained(model_folder, activation_function="gelu_pytorch_tanh")
    exact, rounded = (
        GPT2LMHeadModel.from_pretrained(model_folder, config=config).eval().to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    policy, ids = store.manifest.policy, store.table(0, "tokens/ids").astype(np.int64)
    starts, counts = (store.table(0, f"train/windows/{name}")[:32] for name in ("token_start", "n_tokens"))
    assert (counts == policy.stride).all()
    inputs = np.stack([[policy.bos_token_id, *ids[start : start + policy.stride]] for start in starts])
    kept = inputs != policy.separator_token_id
    kept[:, 0] = False
    with torch.inference_mode():
        states = [model(torch.from_numpy(inputs), output_hidden_states=True).hidden_states for model in (exact, rounded)]
    for layer in (0, 1):
        expected, found = (hidden[layer + 1].float().numpy()[kept].astype(float) for hidden in states)
        missed = np.square(found - expected).sum() / np.square(expected - expected.mean(axis=0)).sum()
        assert 1e-7 < missed < 0.2
        assert recorded[f"resid_post.{layer}"] == pytest.approx(missed, rel=1e-6)


def test_without_another_compute_dtype_nothing_is_said_of_its_effect(small_store: Path) -> None:
    assert "unexplained_by_compute_dtype" not in ActivationStore(small_store).segments[0].environment


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
    policy: dict[str, Any], small_config: CollectConfig, reference: GPT2LMHeadModel, tmp_path: Path
) -> None:
    collect(replace(small_config, out=tmp_path / "store", tokens=700, **policy))
    assert_rows_are_the_models(tmp_path / "store", reference)
    assert_each_kept_token_is_one_row(tmp_path / "store")


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
    codec = store_tokenizer(ActivationStore(store))
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


def test_a_special_token_spelt_out_in_the_corpus_keeps_its_rows_and_its_text(
    small_config: CollectConfig, tmp_path: Path
) -> None:
    text = f"the fox{END_OF_TEXT} saw the owl. " * 20
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    found = collect(replace(small_config, out=tmp_path / "store", corpus=str(tmp_path / "texts"), tokens=10_000, bos=True))
    store = ActivationStore(tmp_path / "store")
    assert found["rows"] == found["tokens"] == store.segments[0].n_tokens
    assert found["control_tokens"] == 0
    assert store_tokenizer(store).text(store.table(0, "tokens/ids")[:-1]) == text


def test_statistics_in_the_records_equal_numpys(store: Path) -> None:
    opened = ActivationStore(store)
    for part in PARTS:
        for site in opened.sites:
            rows = stored_rows(opened, part, f"acts/{site}")[0].astype(np.float64)
            found = opened.statistics(site, part)
            assert found.n_rows == len(rows)
            np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.second_moment, np.square(rows).mean(axis=0), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.deviation, rows.std(axis=0), rtol=1e-6, atol=1e-9)
            assert found.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-9)


# What cannot be kept, or computed


def test_a_value_beyond_fp16_stops_with_its_site_token_position_and_value(
    small_config: CollectConfig, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """One token's embedding is made too large: the message must lead to a place where that token stands."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    token = Tokenizer.from_file(str(model / "tokenizer.json")).encode(" owl", add_special_tokens=False).ids[0]
    weights = load_file(model / "model.safetensors")
    weights["transformer.wte.weight"][token, 5] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    asked = replace(small_config, out=tmp_path / "store", model=str(model), site=("resid_pre",), encoding="fp16")
    with pytest.raises(EncodingError) as caught:
        collect(asked)
    message = str(caught.value)
    assert "does not fit fp16; bf16 keeps up to 3.39e38, fp32 any finite value." in message
    found = re.match(
        r"resid_pre\.0: (\S+), token (\d+) of the segment's table, position (\d+) of its window: value (\S+) in channel 5 ",
        message,
    )
    assert found
    assert float(found[4]) == pytest.approx(1e5, rel=1e-3)
    index, position = int(found[2]), int(found[3])
    store = ActivationStore(tmp_path / "store", partial=True)
    assert store.table(0, "tokens/ids")[index] == token
    document = np.searchsorted(store.table(0, "documents/offsets"), index, side="right") - 1
    assert store.document_names(0)[document] == found[1]
    assert index - position + 1 in [start for part in PARTS for start in store.table(0, f"{part}/windows/token_start")]
    assert collect(replace(asked, out=tmp_path / "wide", encoding="bf16"))["tokens"] == 1500


def test_a_start_of_text_that_does_not_fit_is_named_with_the_document_it_begins(
    small_config: CollectConfig, model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """Position 0 is where a GPT-2's rows are largest, and no token of the table stands there."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"][0, 5] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    asked = replace(
        small_config, out=tmp_path / "store", model=str(model), encoding="fp16", site=("resid_pre",), packing="document"
    )
    assert collect(replace(asked, out=tmp_path / "without"))["tokens"] == 1500, "position 0 is no row"
    with pytest.raises(EncodingError) as caught:
        collect(replace(asked, keep_special=True))
    found = re.match(
        r"resid_pre\.0: (\S+), token (\d+) of the segment's table, position 0 of its window: value", str(caught.value)
    )
    assert found, caught.value
    store = ActivationStore(tmp_path / "store", partial=True)
    document = np.searchsorted(store.table(0, "documents/offsets"), int(found[2]), side="right") - 1
    assert store.document_names(0)[document] == found[1]
    assert int(found[2]) in np.concatenate([store.table(0, f"{part}/windows/token_start") for part in PARTS])


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_neurons_are_kept_at_their_own_width_beside_the_residual_stream(
    small_config: CollectConfig, small_store: Path, tmp_path: Path, encoding: str
) -> None:
    """4 d_model neurons and d_model channels of the same rows, in a copy too; the residual stream is as without them."""
    out = tmp_path / "store"
    collect(replace(small_config, out=out, site=("mlp_hidden", "resid_post"), encoding=encoding))
    recode_store(out, tmp_path / "copy", "bf16")
    alone = ActivationStore(small_store)
    for path in (out, tmp_path / "copy"):
        store = ActivationStore(path)
        assert (store.d_model("mlp_hidden.0"), store.d_model("resid_post.0")) == (128, 32)
        assert faults_in(path) == []
        window, position, rows = (
            np.concatenate([store.read(shard, name) for shard in store.shards()])
            for name in ("rows/window", "rows/position", "acts/mlp_hidden.0")
        )
        assert rows.shape == (alone.n_rows(), 128)
        assert rows.min() > -0.25  # a GELU's least value is -0.17
        assert len(store.statistics("mlp_hidden.0").mean) == 128
        assert len(np.unique(np.stack([window, position]), axis=1).T) == len(rows)


def test_a_segment_in_which_no_token_is_kept_has_no_rows(small_config: CollectConfig, tmp_path: Path) -> None:
    """Without a start token the first token of a window stands at position 0: a segment of one token keeps none."""
    for encoding in ("fp32", "int8"):
        asked = replace(small_config, out=tmp_path / encoding, encoding=encoding, bos=False)
        collect(replace(asked, tokens=200))
        before = ActivationStore(tmp_path / encoding)
        assert collect(replace(asked, tokens=201))["tokens"] == 201
        store = ActivationStore(tmp_path / encoding)
        assert [store.segments[1].parts[part].n_rows for part in PARTS] == [0, 0]
        assert [store.n_rows(part) for part in PARTS] == [before.n_rows(part) for part in PARTS]
        assert faults_in(tmp_path / encoding) == []


def test_a_context_above_the_models_positions_is_refused(small_config: CollectConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context 65: the model has 64 positions; choose --context 64 or less"):
        collect(replace(small_config, out=tmp_path / "store", context=65))
    assert not (tmp_path / "store").exists()


def test_a_tokenizer_with_tokens_the_model_has_not_is_refused(
    small_config: CollectConfig, model_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(100)])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(InputError, match=r"its tokenizer has ids up to \d+, the model's embedding \d+ rows"):
        collect(replace(small_config, out=tmp_path / "store", model=str(model)))
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
def test_a_configuration_that_makes_no_sense_is_refused(wrong: dict[str, Any], small_config: CollectConfig) -> None:
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        replace(small_config, **wrong)
