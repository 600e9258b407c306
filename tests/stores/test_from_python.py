"""What a notebook meets: places named by text, and objects that say what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from storekit import TWO_SEGMENTS, write_store

from actstore import ActivationStore, BatchStream
from actstore.errors import InputError, StoreError
from pipelines.analysis.reader import Analysis
from pipelines.causal.engine.language_model import open_spliced, open_store
from pipelines.codes.code_store import CodeStore
from pipelines.concepts.labels import read_ranges
from pipelines.demo import read_demo
from pipelines.evaluate.stage import read_evaluation
from pipelines.sae.checkpoint import load_run
from pipelines.sae.run_record import read_run_record
from pipelines.stores.facts import facts, run_facts, sweep_facts
from pipelines.stores.listing import list_folder
from pipelines.text.row_text import describe_row
from pipelines.torch_stream import ActivationDataset


def test_load_run_takes_a_string_as_it_takes_a_path(run: Path) -> None:
    by_text, by_path = load_run(str(run)), load_run(run)
    assert by_text[1] == by_path[1] == read_run_record(str(run))
    for name, weight in by_path[0].state_dict().items():
        assert torch.equal(by_text[0].state_dict()[name], weight)


def test_every_reader_takes_a_string_as_it_takes_a_path(run: Path, store: Path, tmp_path: Path) -> None:
    ranges = tmp_path / "labels.jsonl"
    ranges.write_text(json.dumps({"document": "a", "start": 0, "stop": 1, "label": "x"}) + "\n")
    record = read_run_record(run)
    readers: list[tuple[Callable[[Any], Any], Path]] = [
        (run_facts, run),
        (facts, store),
        (list_folder, run.parent),
        (lambda path: list(read_ranges(path)), ranges),
        (lambda path: describe_row(path, 5), store),
        (lambda path: open_store(path, record).store_id, run),
        (lambda path: open_spliced(path, str(store), device="cpu").record, run),
    ]
    for reader, path in readers:
        assert reader(str(path)) == reader(path)


@pytest.mark.parametrize("reader", [load_run, run_facts, sweep_facts, list_folder, read_evaluation, read_demo])
def test_a_string_that_names_nothing_is_one_line_that_names_it(reader: Callable[[Any], Any], tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing here")
    with pytest.raises((StoreError, InputError)) as error:
        reader(missing)
    assert missing in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_store_shows_its_place_rows_sites_and_snapshot(tmp_path: Path) -> None:
    store = ActivationStore(write_store(tmp_path / "store", TWO_SEGMENTS))
    shown = repr(store)
    assert shown == (
        f"<ActivationStore {tmp_path / 'store'}: {store.n_rows():,} train + {store.n_rows('heldout'):,} heldout rows of "
        f"resid_post.0 ({TWO_SEGMENTS.d_model} x fp32), resid_post.1 ({TWO_SEGMENTS.d_model} x bf16); snapshot "
        f"{store.snapshot}>"
    )


def test_a_stream_shows_what_it_gives_and_how_far_it_is(tmp_path: Path) -> None:
    store = ActivationStore(write_store(tmp_path / "store", TWO_SEGMENTS))
    stream = BatchStream(store, "resid_post.0", 32, rank=1, n_ranks=2)
    assert ", 0 rows given" in repr(stream)
    next(iter(stream))
    shown = repr(stream)
    for part in (store.url, "resid_post.0", f"32 x {TWO_SEGMENTS.d_model}", "32 rows given", "rank 1 of 2", store.snapshot):
        assert part in shown
    assert "\n" not in shown


def test_what_a_notebook_holds_says_what_it_is(store: Path, run: Path, codes: Path, analysis: Path) -> None:
    sae, record = load_run(run)
    opened, coded = ActivationStore(store), CodeStore(codes)
    site, size = record.site, f"{sae.d_model:,} -> {sae.n_features:,} features"
    expected = {
        repr(record): [record.run_id, record.architecture, site, size, f"k {record.k}", record.snapshot],
        repr(sae): [sae.architecture, size, f"k {sae.k}"],
        repr(coded): ["CodeStore", str(codes), f"{coded.n_rows():,} train", f"codes/index ({coded.k} x ", coded.snapshot],
        repr(Analysis(analysis)): [str(analysis), f"{sae.n_features:,} features", record.run_id, coded.snapshot],
        repr(ActivationDataset(store, site, 64)): [site, "64 rows", repr(opened)],
    }
    for shown, parts in expected.items():
        assert "\n" not in shown
        assert "object at 0x" not in shown
        assert len(shown) < 500
        assert [part for part in parts if part not in shown] == []
