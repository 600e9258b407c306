"""From a store and a run to an analysis: the same integers as dense arithmetic, wherever the tasks ran."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from daskkit import dask_process
from modelkit import faults_in
from numpy.typing import NDArray
from storekit import files_of
from tablekit import codes_manifest, dense_codes, text_table, write_table_store
from tokenizerkit import saved, with_gaps

from actstore import paths
from actstore.errors import IdentityMismatch, IncompleteStore, InputError, NotAStore, OutputExists, WidthMismatch
from actstore.reader import ActivationStore
from actstore.schema import PARTS
from pipelines.analysis import stage as analyze_module
from pipelines.analysis.reader import RECORD, Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.codes import stage as codes_module
from pipelines.codes.code_store import CodeStore
from pipelines.codes.stage import EncodeConfig, encode
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run, save_run
from pipelines.shared.cluster import connect, reduce_tasks

SITE = "resid_post.2"
EXAMPLES, BEFORE, AFTER = 4, 10, 3


@dataclass(frozen=True)
class Reference:
    """Every row of the activation store, training split first, and its dense codes by the definition in float64."""

    window: NDArray[np.int64]
    position: NDArray[np.int64]
    token: NDArray[np.int64]
    index: NDArray[np.int64]
    codes: NDArray[np.float64]

    @cached_property
    def fired(self) -> NDArray[np.int64]:
        return (self.codes > 0).astype(np.int64)


@pytest.fixture(scope="module")
def reference(store: Path, run: Path) -> Reference:
    opened = ActivationStore(store)
    base = {"train": 0, "heldout": opened.segments[0].parts["train"].n_windows}
    columns: list[tuple[NDArray[Any], ...]] = []
    for part in PARTS:
        for shard in opened.shards(part):
            window, position = (opened.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
            place = opened.table(0, f"{part}/windows/token_start")[window] + position - 1
            token = opened.table(0, "tokens/ids")[place].astype(np.int64)
            rows = opened.read(shard, f"acts/{SITE}").astype(np.float64)
            columns.append((window + base[part], position, token, place, rows))
    window, position, token, place, rows = (np.concatenate(column) for column in zip(*columns, strict=True))
    sae, record = load_run(run)
    weights = {name: tensor.numpy().astype(np.float64) for name, tensor in sae.state_dict().items()}
    pre = (rows - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    codes = np.zeros_like(pre)
    top = np.argsort(-pre, axis=1)[:, : record.k]
    np.put_along_axis(codes, top, np.maximum(np.take_along_axis(pre, top, axis=1), 0), axis=1)
    return Reference(window, position, token, place, codes)


@pytest.fixture(scope="module")
def codes_path(tmp_path_factory: pytest.TempPathFactory, store: Path, run: Path, client: Any) -> Path:
    out = tmp_path_factory.mktemp("codes") / "codes"
    encode(EncodeConfig(store=store, run=run, out=out), client)
    return out


@pytest.fixture(scope="module")
def analysis_path(tmp_path_factory: pytest.TempPathFactory, codes_path: Path, client: Any) -> Path:
    out = tmp_path_factory.mktemp("analysis") / "analysis"
    analyze(config_of(codes_path, out), client)
    return out


@pytest.fixture(scope="module")
def analysis(analysis_path: Path) -> Analysis:
    return Analysis(analysis_path)


def config_of(codes: Path, out: Path, **asked: Any) -> AnalyzeConfig:
    return AnalyzeConfig(codes=codes, out=out, examples=EXAMPLES, before=BEFORE, after=AFTER, **asked)


def arrays_of(folder: Path) -> dict[str, bytes]:
    """Every byte of every array of a store or analysis."""
    data = folder / paths.DATA
    return {file.relative_to(data).as_posix(): file.read_bytes() for file in data.rglob("*") if file.is_file()}


# The code store


def test_codes_are_the_dense_codes_of_the_same_rows(codes_path: Path, reference: Reference) -> None:
    codes = CodeStore(codes_path)
    assert (codes.n_features, codes.k) == (64, 4)
    place = {(w, p): i for i, (w, p) in enumerate(zip(reference.window.tolist(), reference.position.tolist(), strict=True))}
    base = {"train": 0, "heldout": codes.segments[0].parts["train"].n_windows}
    n_rows = 0
    for part in PARTS:
        for shard in codes.shards(part):
            window, position = (codes.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
            rows = [place[w + base[part], p] for w, p in zip(window.tolist(), position.tolist(), strict=True)]
            dense = np.zeros((shard.n_rows, 64))
            index = codes.read(shard, "codes/index").astype(np.int64)
            np.put_along_axis(dense, index, codes.read(shard, "codes/value"), axis=1)
            np.testing.assert_allclose(dense, reference.codes[rows], rtol=0, atol=1e-5 * reference.codes.max())
            np.testing.assert_array_equal(dense > 0, reference.codes[rows] > 0)
            n_rows += shard.n_rows
    assert n_rows == len(place)


def test_rows_lie_in_text_order_inside_the_shard_they_had(codes_path: Path, store: Path) -> None:
    codes, source = CodeStore(codes_path), ActivationStore(store)
    for part in PARTS:
        assert codes.shards(part) == source.shards(part)
        for shard in codes.shards(part):
            found, shuffled = (
                list(zip(s.read(shard, "rows/window").tolist(), s.read(shard, "rows/position").tolist(), strict=True))
                for s in (codes, source)
            )
            assert found == sorted(shuffled) != shuffled
            index = codes.read(shard, "codes/index").astype(np.int64)
            assert (np.diff(index, axis=1) > 0).all()


def test_a_code_store_verifies_and_names_where_it_came_from(codes_path: Path, store: Path, run: Path) -> None:
    codes = CodeStore(codes_path)
    assert faults_in(codes_path) == []
    source = ActivationStore(store)
    expected = {
        "store_id": source.store_id,
        "snapshot": source.snapshot,
        "run_id": load_run(run)[1].run_id,
        "site": SITE,
    }
    assert codes.manifest.source.items() >= expected.items()
    with pytest.raises(NotAStore, match="holds activations, codes are needed"):
        CodeStore(store)
    with pytest.raises(NotAStore, match="holds codes, activations are needed"):
        ActivationStore(codes_path)


def test_a_code_store_stands_alone(
    codes_path: Path, analysis_path: Path, store: Path, run: Path, client: Any, tmp_path: Path
) -> None:
    """Encoded from copies that are gone when it is analysed."""
    shutil.copytree(store, tmp_path / "store")
    shutil.copytree(run, tmp_path / "run")
    encode(EncodeConfig(store=tmp_path / "store", run=tmp_path / "run", out=tmp_path / "codes"), client)
    shutil.rmtree(tmp_path / "store")
    shutil.rmtree(tmp_path / "run")
    analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)
    assert arrays_of(tmp_path / "codes") == arrays_of(codes_path)
    assert arrays_of(tmp_path / "analysis") == arrays_of(analysis_path)


def interrupt_encode(config: EncodeConfig, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a code store, and stop after its first five shards."""

    def run_some(_client: Any, _label: str, function: Callable[..., None], tasks: list[tuple[Any, ...]]) -> None:
        for task in tasks[:5]:
            function(*task)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(codes_module, "run_tasks", run_some)
        with pytest.raises(KeyboardInterrupt):
            encode(config, client)
    with pytest.raises(IncompleteStore, match="half-written, 5 of"):
        CodeStore(config.out)


def test_an_interrupted_encode_is_continued(
    codes_path: Path, store: Path, run: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(store=store, run=run, out=tmp_path / "codes")
    interrupt_encode(config, client, monkeypatch)
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "codes").rglob("c/*/*") if file.is_file()}
    encode(config, client)
    assert arrays_of(tmp_path / "codes") == arrays_of(codes_path)
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert encode(config, client)["rows"] == sum(CodeStore(codes_path).n_rows(part) for part in PARTS)


def test_an_interrupted_encode_goes_on_with_the_rows_it_began_with_when_the_store_has_grown(
    small_config: CollectConfig, run: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(small_config, out=tmp_path / "store", layer=(2,))
    collect(asked)
    config = EncodeConfig(store=tmp_path / "store", run=run, out=tmp_path / "codes")
    whole = replace(config, out=tmp_path / "whole")
    rows = encode(whole, client)["rows"]
    interrupt_encode(config, client, monkeypatch)
    snapshot = ActivationStore(tmp_path / "store").snapshot
    collect(replace(asked, tokens=2200))
    assert encode(config, client)["rows"] == rows
    assert files_of(tmp_path / "codes") == files_of(tmp_path / "whole")
    assert CodeStore(tmp_path / "codes").manifest.source["snapshot"] == snapshot
    before = files_of(tmp_path / "whole")
    assert encode(whole, client)["rows"] == rows, "a finished code store stays what it is"
    assert files_of(tmp_path / "whole") == before
    assert encode(replace(config, out=tmp_path / "all"), client)["rows"] > rows


def test_codes_of_another_run_are_not_mixed_in(
    codes_path: Path, store: Path, run: Path, client: Any, tmp_path: Path
) -> None:
    sae, record = load_run(run)
    save_run(tmp_path / "other", sae, replace(record, rows_seen=1))
    with pytest.raises(IdentityMismatch, match=r"holds another store .*source\.run_id"):
        encode(EncodeConfig(store=store, run=tmp_path / "other", out=codes_path), client)
    with pytest.raises(OutputExists, match="exists and is not a store"):
        encode(EncodeConfig(store=store, run=run, out=run), client)


def test_a_worker_that_lives_on_sees_a_run_that_was_replaced(store: Path, run: Path, client: Any, tmp_path: Path) -> None:
    sae, record = load_run(run)
    save_run(tmp_path / "run", sae, record)
    encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)
    for folder in ("run", "codes", "analysis"):
        shutil.rmtree(tmp_path / folder)
    silent = TopKSae(record.d_model, record.n_features, record.k)
    torch.nn.init.constant_(silent.b_enc, -1e9)
    save_run(tmp_path / "run", silent, replace(record, rows_seen=1))
    encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    assert analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)["bands"]["dead"] == record.n_features


def test_the_last_of_256_features_may_be_the_only_one(store: Path, run: Path, client: Any, tmp_path: Path) -> None:
    """Its index is the largest integer of the array, and could be taken for the value of places without a row."""
    sae = TopKSae(32, 256, 1)
    with torch.no_grad():
        sae.b_enc[255] = 1e6
    save_run(tmp_path / "run", sae, replace(load_run(run)[1], n_features=256, k=1, code_width=1))
    encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    codes = CodeStore(tmp_path / "codes")
    assert faults_in(tmp_path / "codes") == []
    assert all((codes.read(shard, "codes/index") == 255).all() for shard in codes.shards())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"site": "resid_post.1"}, InputError, r"reads resid_post\.1, .* holds resid_post\.0, resid_post\.2"),
        ({"d_model": 16}, WidthMismatch, r"the SAE has d_model=16, .* has d_model=32"),
        ({"weights_sha256": "e" * 64}, IdentityMismatch, "trained on a model with weights eeeeeeeeeeee"),
    ],
    ids=["site", "width", "model"],
)
def test_an_sae_of_other_rows_is_refused(
    store: Path, run: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    record = replace(load_run(run)[1], **change)
    save_run(tmp_path / "run", TopKSae(record.d_model, record.n_features, record.k), record)
    with pytest.raises(error, match=message):
        encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"))
    assert not (tmp_path / "codes").exists()


# The analysis against dense arithmetic


def test_frequency_and_cooccurrence_are_exactly_the_dense_ones(analysis: Analysis, reference: Reference) -> None:
    fires = reference.fired.sum(axis=0)
    assert analysis.n_rows == len(reference.codes)
    np.testing.assert_array_equal(analysis.fires, fires)
    np.testing.assert_array_equal(analysis.frequency, fires / len(reference.codes))
    assert analysis.cooccurrence.dtype == np.int64
    np.testing.assert_array_equal(analysis.cooccurrence.toarray(), np.triu(reference.fired.T @ reference.fired, k=1))
    assert fires.max() > 0


def test_strength_is_the_dense_one(analysis: Analysis, reference: Reference) -> None:
    fires = np.maximum(reference.fired.sum(axis=0), 1)
    np.testing.assert_allclose(analysis.mean, reference.codes.sum(axis=0) / fires, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(analysis.peak, reference.codes.max(axis=0), rtol=1e-4, atol=1e-5)


def test_the_bands_count_every_feature_and_name_each_as_they_count_it(analysis: Analysis) -> None:
    bands = analysis.record.bands
    assert sum(bands.values()) == 64
    names = [analysis.band(feature) for feature in range(64)]
    assert {name: names.count(name) for name in bands} == bands


def test_tokens_and_recall_are_the_dense_ones(analysis: Analysis, reference: Reference) -> None:
    rows_of_token = np.bincount(reference.token, minlength=len(analysis.token_rows))
    np.testing.assert_array_equal(analysis.token_rows, rows_of_token)
    for feature in range(64):
        counts = np.bincount(reference.token[reference.fired[:, feature] > 0], minlength=len(rows_of_token))
        expected = [t for t in np.lexsort((np.arange(len(counts)), -counts)).tolist() if counts[t]][:5]
        shown = analysis.top_tokens(feature)
        assert [token.token for token in shown] == expected
        for token in shown:
            assert token.count == counts[token.token]
            assert token.share == pytest.approx(counts[token.token] / counts.sum())
            assert token.recall == pytest.approx(counts[token.token] / rows_of_token[token.token])
            assert token.text == analysis.token_texts[token.token]


def test_partners_are_the_dense_ones(analysis: Analysis, reference: Reference) -> None:
    together = reference.fired.T @ reference.fired
    fires = reference.fired.sum(axis=0)
    np.fill_diagonal(together, 0)
    for feature in range(64):
        order = np.lexsort((np.arange(64), -together[feature]))
        expected = [(partner, together[feature, partner]) for partner in order[:5].tolist() if together[feature, partner]]
        found = analysis.partners(feature)
        assert [(partner, n) for partner, n, _ in found] == expected
        for partner, n, lift in found:
            assert lift == pytest.approx(n * len(reference.codes) / fires[feature] / fires[partner])


def test_examples_are_the_strongest_firings_one_a_window_with_their_text(
    analysis: Analysis, reference: Reference, store: Path
) -> None:
    source = ActivationStore(store)
    ids, names = source.table(0, "tokens/ids"), source.document_names(0)
    offsets = source.table(0, "documents/offsets")
    n_tokens = np.concatenate([source.table(0, f"{part}/windows/n_tokens") for part in PARTS])
    window_end = 1 + n_tokens.astype(np.int64)
    row_at = {place: row for row, place in enumerate(reference.index.tolist())}
    n_shown = 0
    for feature in range(64):
        column = reference.codes[:, feature]
        best: dict[int, int] = {}
        for row in np.lexsort((reference.position, reference.window, -column)).tolist():
            if column[row] > 0:
                best.setdefault(int(reference.window[row]), row)
        rows = list(best.values())[:EXAMPLES]
        examples = analysis.examples(feature)
        assert [example.value for example in examples] == pytest.approx([column[row] for row in rows], rel=1e-4)
        for example, row in zip(examples, rows, strict=True):
            place, position, window = (int(c[row]) for c in (reference.index, reference.position, reference.window))
            assert example.document == names[int(np.searchsorted(offsets, place, side="right")) - 1]
            assert example.focus == BEFORE
            assert len(example.tokens) == len(example.values) == BEFORE + 1 + AFTER
            for step, (text, value) in enumerate(zip(example.tokens, example.values, strict=True), start=-BEFORE):
                other = row_at.get(place + step)
                is_row = other is not None and reference.window[other] == window
                assert value == pytest.approx(column[other] if is_row else 0, rel=1e-4, abs=1e-5)
                if is_row:
                    assert text == analysis.token_texts[ids[place + step]]
                else:
                    assert text == ("<|endoftext|>" if 1 <= position + step < window_end[window] else "")
            n_shown += 1
    assert n_shown > 64


def test_the_text_around_an_example_is_that_of_its_file(analysis: Analysis, texts: Path) -> None:
    n_checked = 0
    for feature in range(64):
        for example in analysis.examples(feature):
            shown = "".join(example.tokens)
            if "�" not in shown and "<|endoftext|>" not in shown:
                (file,) = [file for file in texts.glob("*.txt") if example.document.endswith(file.name)]
                assert shown in file.read_text(encoding="utf-8")
                n_checked += 1
    assert n_checked > 50


def test_nothing_is_shown_beyond_the_ends_of_a_window(model_folder: Path, client: Any, tmp_path: Path) -> None:
    """Feature 0 is strongest where a window begins, feature 1 where it ends; both fire on every token."""
    table, codec, files = text_table({"story.txt": "The fox went to the wood. " * 40}, model_folder, modulus=0)
    rising = np.arange(1, len(table.ids) + 1, dtype=np.float32)
    values = np.stack([rising[::-1], rising], axis=1)
    manifest = codes_manifest(2, 2, codec)
    write_table_store(tmp_path / "codes", manifest, table, lambda index: dense_codes(values[index]), files)
    analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)
    analysis = Analysis(tmp_path / "analysis")
    for feature, outside in ((0, slice(None, BEFORE)), (1, slice(BEFORE + 1, None))):
        for example in analysis.examples(feature)[1:]:
            assert set(example.tokens[outside]) == {""}
            assert [value > 0 for value in example.values] == [text != "" for text in example.tokens]


def test_a_vocabulary_with_gaps_is_analyzed_by_its_ids(client: Any, tmp_path: Path) -> None:
    """251 tokens, of which "a" has the id 299."""
    text = "banana and papaya, a taxi at a bazaar. " * 30
    table, codec, files = text_table({"story.txt": text}, saved(with_gaps(), tmp_path / "model"), modulus=0)
    values = (table.ids == 299).astype(np.float32)[:, None]
    write_table_store(
        tmp_path / "codes", codes_manifest(1, 1, codec), table, lambda index: dense_codes(values[index]), files
    )
    analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)
    analysis = Analysis(tmp_path / "analysis")
    (token,) = analysis.top_tokens(0)
    assert (token.token, token.text, token.share, token.recall) == (299, "a", 1.0, 1.0)
    assert analysis.extent.n_vocabulary == len(analysis.token_rows) == len(analysis.token_texts) == 300


# Wherever the tasks run


@pytest.mark.parametrize("workers", [1, 2])
def test_local_worker_processes_write_the_same_arrays(
    codes_path: Path, analysis_path: Path, tmp_path: Path, workers: int
) -> None:
    analyze(config_of(codes_path, tmp_path / "analysis", workers=workers))
    assert arrays_of(tmp_path / "analysis") == arrays_of(analysis_path)
    assert json.loads((tmp_path / "analysis" / RECORD).read_text()) == json.loads((analysis_path / RECORD).read_text())


@pytest.mark.cluster
def test_a_scheduler_and_a_worker_of_their_own_write_the_same_arrays(
    store: Path,
    run: Path,
    codes_path: Path,
    analysis_path: Path,
    scheduler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both stages, named by relative paths that mean something else in the folder the worker runs in."""
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.shared.cluster.WORKERS_TIMEOUT_S", 0.1)
        with pytest.raises(InputError, match=r"has no workers after 0.1 s; start `dask worker"):
            encode(EncodeConfig(store=store, run=run, out=tmp_path / "codes", scheduler=scheduler))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(store, "store")
    shutil.copytree(run, "run")
    with dask_process("worker", "--nthreads", "1", "--no-nanny", folder=tmp_path):
        from distributed import Client

        with Client(scheduler) as waiting:
            waiting.wait_for_workers(1, timeout=60)
        encode(EncodeConfig(store=Path("store"), run=Path("run"), out=Path("codes"), scheduler=scheduler))
        analyze(config_of(Path("codes"), Path("analysis"), scheduler=scheduler))
    assert arrays_of(home / "codes") == arrays_of(codes_path)
    assert arrays_of(home / "analysis") == arrays_of(analysis_path)


def test_a_scheduler_that_does_not_answer_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.shared.cluster.CONNECT_TIMEOUT_S", 0.5)
    with (
        pytest.raises(InputError, match=r"scheduler tcp://127\.0\.0\.1:9: does not answer"),
        connect("tcp://127.0.0.1:9", 1),
    ):
        pass


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7, 8])
def test_the_merge_tree_takes_every_task_once_in_order(client: Any, n_tasks: int) -> None:
    tasks = [(str(i),) for i in range(n_tasks)]
    found = reduce_tasks(client, "test", str, lambda a, b: f"({a}{b})", tasks)
    assert found.replace("(", "").replace(")", "") == "".join(str(i) for i in range(n_tasks))
    assert found == {1: "0", 2: "(01)", 3: "(0(12))", 7: "((0(12))((34)(56)))", 8: "(((01)(23))((45)(67)))"}[n_tasks]


def test_a_failing_task_raises_its_own_error(client: Any) -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        reduce_tasks(client, "test", int, max, [("1",), ("x",), ("2",)])


# All or nothing


def test_an_interrupted_analysis_leaves_nothing(
    codes_path: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("reduce_tasks", "run_tasks", "reduce_groups", "contexts", "write_exports"):
        with monkeypatch.context() as patch:
            patch.setattr(analyze_module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                analyze(config_of(codes_path, tmp_path / "out" / "analysis"), client)
        assert not (tmp_path / "out/analysis").exists()
        with pytest.raises(NotAStore, match="not an analysis"):
            Analysis(tmp_path / "out/analysis.partial/result")
    analyze(config_of(codes_path, tmp_path / "out" / "analysis"), client)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["analysis"]


def test_an_output_that_exists_is_not_touched(codes_path: Path, analysis_path: Path, client: Any) -> None:
    with pytest.raises(OutputExists, match="exists; choose another --out"):
        analyze(config_of(codes_path, analysis_path), client)
    assert Analysis(analysis_path).n_features == 64


def test_what_is_no_finished_code_store_is_refused(
    store: Path, run: Path, codes_path: Path, client: Any, tmp_path: Path
) -> None:
    partial = Path(shutil.copytree(codes_path, tmp_path / "codes"))
    (partial / paths.sealed_record(0)).unlink()
    (partial / paths.shard_record(0, "train", 3)).unlink()
    for codes, error in [(store, NotAStore), (run, NotAStore), (partial, IncompleteStore), (tmp_path / "none", NotAStore)]:
        with pytest.raises(error):
            analyze(config_of(codes, tmp_path / "analysis"), client)
    assert not (tmp_path / "analysis").exists()
    with pytest.raises(NotAStore, match="not an analysis"):
        Analysis(codes_path)


@pytest.mark.parametrize("asked", [{"examples": 0}, {"before": -1}, {"after": -1}])
def test_a_text_of_negative_length_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="need at least 1, 0 and 0"):
        AnalyzeConfig(codes=Path("c"), out=Path("o"), **asked)


def test_codes_of_no_firing_at_all_are_analysed(store: Path, run: Path, client: Any, tmp_path: Path) -> None:
    sae = TopKSae(32, 8, 2)
    torch.nn.init.constant_(sae.b_enc, -1e9)
    save_run(tmp_path / "run", sae, replace(load_run(run)[1], n_features=8, k=2, code_width=2))
    encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    record = analyze(config_of(tmp_path / "codes", tmp_path / "analysis"), client)
    assert record["bands"] == {"always": 0, "common": 0, "rare": 0, "very rare": 0, "dead": 8}
    analysis = Analysis(tmp_path / "analysis")
    assert (analysis.examples(0), analysis.partners(0), analysis.top_tokens(0)) == ([], [], [])
