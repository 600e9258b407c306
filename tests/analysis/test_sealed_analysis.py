"""An analysis that lost something, was changed, or was made by a stranger: refused in one line, never read as zeros."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray

from actstore.errors import ActstoreError, DamagedStore, IncompleteStore, NotAStore, OutputExists
from actstore.files import record_bytes
from actstore.folder import Folder
from actstore.kind import SEAL
from actstore.sealed_folder import open_sealed, seal_folder, unseal
from cli import cli
from pipelines.analysis.cards import feature_card
from pipelines.analysis.reader import Analysis
from pipelines.analysis.record import RECORD
from pipelines.analysis.stage import AnalyzeConfig, analyze

ARRAY = "data.zarr/features/fires"
COUNTS = [20, pytest.param(200, marks=pytest.mark.slow)]
"""Random mutations of each record."""


@pytest.fixture
def own(analysis: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(analysis, tmp_path / "analysis"))


def sealed_again(folder: Path) -> Path:
    """As a stranger would: the seal fits whatever lies there."""
    unseal(Folder(folder))
    seal_folder(Folder(folder), "analysis", RECORD, whole=("data.zarr", "tokenizer"))
    return folder


def shown(folder: Path) -> None:
    """Read what a card, a list and a search show."""
    opened = Analysis(folder)
    feature = int(np.argmax(opened.fires))
    for kind in ("top", "strata", "random"):
        feature_card(opened, feature, kind)
    _ = (opened.joint, opened.active, opened.document_rows, opened.features_on(0))
    opened.preload()
    for table in (opened.pairs, opened.tokens):
        table.whole()


def refused(folder: Path) -> str:
    """The one line with which `features` and `feature` refuse."""
    for arguments in (["features", folder], ["feature", folder, 0]):
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        if result.exit_code:
            assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
            return result.stderr
    pytest.fail("nothing was refused")


def metadata(folder: Path, array: str = ARRAY) -> tuple[Path, dict[str, Any]]:
    path = folder / array / "zarr.json"
    return path, json.loads(path.read_bytes())


# Lost and changed


def test_a_missing_chunk_of_an_analysis_never_reads_as_zeros(own: Path) -> None:
    chunks = sorted(path for path in own.glob("data.zarr/**/c/*") if path.is_file())
    assert len(chunks) > 20
    for chunk in chunks:
        data = chunk.read_bytes()
        chunk.unlink()
        assert f"{chunk.relative_to(own)}: missing; restore it" in refused(own)
        chunk.write_bytes(data)
    shown(own)


def test_a_chunk_that_a_stranger_left_out_does_not_read_as_zeros(own: Path) -> None:
    (own / ARRAY / "c/0").unlink()
    assert "1 of 1 objects are missing" in refused(sealed_again(own))


def test_a_chunk_lost_while_the_analysis_is_open_does_not_read_as_zeros(own: Path) -> None:
    opened = Analysis(own)
    (own / ARRAY / "c/0").unlink()
    with pytest.raises(DamagedStore, match="features/fires: cannot be read"):
        opened.fires  # noqa: B018


def test_chunks_of_zeros_are_written_like_others(own: Path) -> None:
    for path in own.glob("data.zarr/**/zarr.json"):
        found = json.loads(path.read_bytes())
        if found["node_type"] == "array":
            cut = found["chunk_grid"]["configuration"]["chunk_shape"]
            expected = np.prod([-(-n // own_length) for n, own_length in zip(found["shape"], cut, strict=True)], dtype=int)
            assert sum(one.is_file() for one in path.parent.glob("c/**/*")) == expected, path


def test_a_changed_chunk_is_refused_by_its_crc_and_named_by_verify(own: Path) -> None:
    chunk = own / ARRAY / "c/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert "features/fires: cannot be read" in refused(own)
    result = CliRunner().invoke(cli, ["verify", str(own)])
    assert (result.exit_code, f"{ARRAY}/c/0: sha256" in result.stdout) == (1, True), result.output
    assert "restore it from a copy" in result.stderr


def test_an_analysis_without_its_seal_is_not_finished(own: Path) -> None:
    (own / SEAL).unlink()
    assert "is not finished (no seal.json)" in refused(own)
    with pytest.raises(IncompleteStore):
        Analysis(own)


def test_an_analysis_of_an_older_version_is_named_and_its_codes_are_good(own: Path) -> None:
    record = json.loads((own / RECORD).read_bytes())
    (own / RECORD).write_text(json.dumps({**record, "version": 2}))
    (own / SEAL).unlink()
    assert "an analysis of format version 2, this actstore reads 3; its codes are still good" in refused(own)


def mutated(data: bytes, generator: random.Random) -> bytes:
    """A record with one bit changed, or a field dropped, retyped, made huge, or nested."""
    value = json.loads(data)
    field = generator.choice(sorted(value))
    match generator.randrange(6):
        case 0:
            changed = bytearray(data)
            changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            return bytes(changed)
        case 1:
            del value[field]
        case 2:
            value[field] = generator.choice(["1", [], {}, None, -1, 1.5, True, "\x1b]0;x\x07"])
        case 3:
            value[field] = 10 ** generator.randrange(12, 400)
        case 4:
            return data[:-2] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        case _:
            value[field] = {"x": value[field]}
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("n_mutations", COUNTS)
@pytest.mark.parametrize("name", [RECORD, SEAL])
def test_no_mutation_of_a_record_is_read_as_data(own: Path, name: str, n_mutations: int) -> None:
    data, generator = (own / name).read_bytes(), random.Random(0)
    for _ in range(n_mutations):
        changed = mutated(data, generator)
        if changed == data:
            continue
        (own / name).write_bytes(changed)
        with pytest.raises((DamagedStore, NotAStore)) as caught:
            Analysis(own)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_mutations", COUNTS)
@pytest.mark.parametrize("name", [RECORD, f"{ARRAY}/zarr.json", "data.zarr/tokens/tiles/000000/columns/zarr.json"])
def test_no_mutation_that_a_stranger_sealed_ends_in_a_traceback(own: Path, name: str, n_mutations: int) -> None:
    data, generator, lines = (own / name).read_bytes(), random.Random(1), []
    for _ in range(n_mutations):
        (own / name).write_bytes(mutated(data, generator))
        try:
            shown(sealed_again(own))
        except ActstoreError as error:
            lines.append(str(error))
    assert len(lines) > n_mutations // 2
    assert not any("\n" in line for line in lines)


# Made by a stranger


class Command:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_zarr_2_array_whose_codec_unpickles_is_never_decoded(own: Path, tmp_path: Path) -> None:
    folder = own / ARRAY
    shutil.rmtree(folder)
    folder.mkdir()
    array = {
        "zarr_format": 2,
        "shape": [64],
        "chunks": [64],
        "dtype": "|O",
        "compressor": {"id": "pickle", "protocol": 5},
        "filters": [{"id": "vlen-utf8"}],
        "fill_value": None,
        "order": "C",
    }
    (folder / ".zarray").write_text(json.dumps(array))
    (folder / "0").write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    assert "features/fires: has no zarr.json, which `analyze` writes" in refused(sealed_again(own))
    for path in own.glob("data.zarr/**/zarr.json"):  # and the groups as well
        if json.loads(path.read_bytes())["node_type"] == "group":
            path.unlink()
            (path.parent / ".zgroup").write_text('{"zarr_format": 2}')
    assert "features/fires: has no zarr.json" in refused(sealed_again(own))
    assert not (tmp_path / "ran").exists()


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 8, "blocksize": 0},
}
CRC = {"name": "crc32c"}


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "numcodecs.pickle", "configuration": {}}],
        [BYTES, {"name": "numcodecs.zlib", "configuration": {"level": 1}}, CRC],
        [BYTES, {"name": "zstd", "configuration": {"level": 0}}, CRC],
        [BYTES, {"name": "gzip", "configuration": {"level": 5}}],
        [BYTES, {**BLOSC, "configuration": {**BLOSC["configuration"], "cname": "zstd"}}, CRC],  # type: ignore[dict-item]
        [BYTES, BLOSC],
        [BYTES, CRC, BLOSC],
        [{"name": "vlen-utf8"}],
        [{"name": "transpose", "configuration": {"order": [0]}}, BYTES, BLOSC, CRC],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [64], "codecs": [{"name": "vlen-bytes"}]}}],
        [{"name": "sharding_indexed"}],
        [],
        "bytes",
        [7],
    ],
)
def test_codecs_that_analyze_does_not_write_are_refused(own: Path, codecs: Any) -> None:
    path, value = metadata(own)
    path.write_text(json.dumps({**value, "codecs": codecs}))
    assert f"{ARRAY}/zarr.json: " in refused(sealed_again(own))


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "string"},
        {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}},
        {"data_type": "variable_length_bytes"},
        {"data_type": "int8"},
        {"zarr_format": 2},
        {"node_type": "group"},
        {"storage_transformers": [{"name": "x"}]},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
        {"shape": [65]},
        {"shape": [10**12]},
        {"shape": [10**30]},
        {"shape": [-1]},
        {"shape": ["64"]},
        {"shape": []},
        {"shape": [64, 1]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**12]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
        {"unknown": 1},
    ],
)
def test_arrays_that_analyze_does_not_write_are_refused(own: Path, change: dict[str, Any]) -> None:
    path, value = metadata(own)
    path.write_text(json.dumps({**value, **change}))
    line = refused(sealed_again(own))
    assert "features/fires" in line


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_is_not_believed(own: Path) -> None:
    zarr.consolidate_metadata(zarr.storage.LocalStore(own / "data.zarr"))
    root = json.loads((own / "data.zarr/zarr.json").read_bytes())
    array = root["consolidated_metadata"]["metadata"]["features/fires"]
    array["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    (own / "data.zarr/zarr.json").write_text(json.dumps(root))
    shown(sealed_again(own))


def test_a_shape_beyond_what_the_stored_bytes_can_hold_is_refused_before_it_is_allocated(own: Path) -> None:
    n = 1 << 40
    record = json.loads((own / RECORD).read_bytes())
    (own / RECORD).write_text(json.dumps({**record, "context": n}))
    path, value = metadata(own, "data.zarr/rows/positions")
    value["shape"] = value["chunk_grid"]["configuration"]["chunk_shape"] = [n]
    path.write_text(json.dumps(value))
    opened = Analysis(sealed_again(own))
    assert opened.extent.context == n
    with pytest.raises(DamagedStore, match="cannot unfold to the"):
        opened.arrays_of("rows")


@pytest.mark.parametrize("name", ["columns", "starts", "count"])
def test_a_table_whose_parts_do_not_fit_together_is_refused(own: Path, name: str) -> None:
    for table in ("tokens", "cooccurrence"):
        folder = own / f"data.zarr/{table}/tiles/000000/{name}"
        array: Any = zarr.open_array(folder, mode="r+")
        values: NDArray[Any] = array[:]
        if name == "columns":
            values[len(values) // 2 :] = np.iinfo(values.dtype).max
        elif name == "starts":
            values[1] = np.iinfo(values.dtype).max
        else:
            array.resize((len(values) - 1,))
            values = values[:-1]
        array[:] = values
    with pytest.raises(DamagedStore, match=r"tiles/000000"):
        shown(sealed_again(own))


def test_a_tile_that_is_left_out_is_refused(own: Path) -> None:
    shutil.rmtree(own / "data.zarr/tokens/tiles/000000")
    with pytest.raises(DamagedStore, match="tokens/tiles/000000: its starts or columns are missing"):
        shown(sealed_again(own))


@pytest.mark.parametrize(
    "change",
    [
        {"n_features": "64"},
        {"n_features": 10**12},
        {"n_features": 63},
        {"n_vocabulary": 1},
        {"n_vocabulary": 10**6},
        {"n_documents": 10**9},
        {"k": -1},
        {"bands": {"dead": 1}},
        {"bands": {"dead": "64"}},
        {"example_slots": {"top": [0, 10**9], "strata": [0, 1], "random": [0, 1]}},
        {"example_slots": {"top": [0, 8]}},
        {"example_slots": []},
        {"focus": 10**6},
        {"codes_id": "x"},
        {"more": 1},
        {"quantiles": ["0.5"]},
        {"format": "actstore-run"},
        {"version": "3"},
    ],
)
def test_a_record_that_a_stranger_made_is_one_line(own: Path, change: dict[str, Any]) -> None:
    record = json.loads((own / RECORD).read_bytes())
    (own / RECORD).write_text(json.dumps({**record, **change}))
    refused(sealed_again(own))


def test_a_record_of_another_analysis_is_refused(own: Path, analysis: Path) -> None:
    record = json.loads((own / RECORD).read_bytes())
    (own / RECORD).write_bytes((own / RECORD).read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    assert json.loads((own / RECORD).read_bytes()) != record
    with pytest.raises(DamagedStore, match=r"analysis.json: is not the object that was sealed"):
        Analysis(own)


def test_a_table_of_structure_that_a_stranger_made_is_one_line(own: Path) -> None:
    for data in (b"no table", b"PAR1" + bytes(100) + b"PAR1"):
        shutil.rmtree(own / "structure", ignore_errors=True)
        (own / "structure").mkdir()
        (own / "structure/structure.json").write_text('{"format": "actstore-structure"}')
        (own / "structure/pairs.parquet").write_bytes(data)
        seal_folder(Folder(own / "structure"), "structure", "structure.json")
        assert "not the pairs that `structure` writes" in refused(own)


@pytest.mark.parametrize(
    "findings",
    [
        "[]",
        "{}",
        '{"findings": 1}',
        '{"findings": [[]]}',
        '{"findings": [{"feature": 1e999}]}',
        '{"findings": [{}]}',
        "[" * 10**5,
    ],
)
def test_findings_that_a_stranger_made_are_one_line(own: Path, findings: str) -> None:
    (own / "findings.json").write_text(findings)
    with pytest.raises(DamagedStore, match=r"findings.json") as caught:
        Analysis(own).findings  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_seal_of_other_things_is_no_analysis(own: Path) -> None:
    seal = open_sealed(own, "analysis", "analyze").seal
    entries = {name: {"bytes": one.bytes, "sha256": one.sha256} for name, one in seal.objects.items()}
    head = {"format": seal.format, "version": seal.version, "record": seal.record, "whole": seal.whole}
    (own / SEAL).write_bytes(record_bytes({**head, "kind": "effects", "objects": entries}))
    assert "holds effects, not an analysis" in refused(own)


# Interrupted before the seal


def test_an_analysis_stopped_before_its_seal_is_not_there_and_is_finished_by_the_next(
    codes: Path, analysis: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked = AnalyzeConfig(codes=codes, out=tmp_path / "analysis")
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.analysis.stage.seal_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            analyze(asked, client)
    assert not (tmp_path / "analysis").exists()
    with pytest.raises(IncompleteStore):
        Analysis(tmp_path / "analysis.partial/result")
    analyze(asked, client)
    for path in analysis.rglob("*"):
        if path.is_file():
            assert (tmp_path / "analysis" / path.relative_to(analysis)).read_bytes() == path.read_bytes(), path


def test_an_analysis_in_a_folder_that_may_only_be_read_is_read(own: Path) -> None:
    paths = [own, *own.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        shown(own)
    finally:
        for path in paths:
            path.chmod(0o755)
    assert sorted(own.rglob("*")) == sorted(paths[1:])


def test_what_came_to_lie_at_the_output_meanwhile_is_not_touched(
    codes: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sealed_and_taken(*arguments: Any, **options: Any) -> None:
        seal_folder(*arguments, **options)
        (tmp_path / "analysis").mkdir()
        (tmp_path / "analysis/theirs").write_text("x")

    monkeypatch.setattr("pipelines.analysis.stage.seal_folder", sealed_and_taken)
    with pytest.raises(OutputExists, match="analysis: exists"):
        analyze(AnalyzeConfig(codes=codes, out=tmp_path / "analysis"), client)
    assert [path.name for path in (tmp_path / "analysis").iterdir()] == ["theirs"]
