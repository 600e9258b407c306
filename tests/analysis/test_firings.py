"""`feature --firings`: every firing of a feature, as a scan of all codes gives them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from actstore.errors import IdentityMismatch, IncompleteStore, InputError
from actstore.schema import PARTS
from cli import cli
from pipelines.analysis.cards import firings_lines
from pipelines.analysis.firings import AFTER, BEFORE, feature_firings
from pipelines.analysis.reader import Analysis
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.codes.feature_index import FeatureIndex
from pipelines.text.tokenizer_files import store_tokenizer


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def scanned(codes: CodeStore, feature: int) -> list[dict[str, Any]]:
    """The firings of a feature by reading every code of the store, strongest first, ties by row."""
    codec, row, firings = store_tokenizer(codes), 0, []
    for segment in range(len(codes.segments)):
        names, offsets = codes.document_names(segment), codes.table(segment, "documents/offsets")
        ids = codes.table(segment, "tokens/ids")
        for shard in (shard for part in PARTS for shard in codes.shards(part) if shard.segment == segment):
            indices, values = read_codes(codes, shard)
            position, places = codes.read(shard, "rows/position"), codes.token_index(shard)
            tokens, documents = codes.token_ids(shard), codes.documents(shard)
            for i, slot in zip(*np.nonzero((indices == feature) & (values > 0)), strict=True):
                at, document = int(places[i]), int(documents[i])
                first, last = max(at - BEFORE, offsets[document]), min(at + 1 + AFTER, offsets[document + 1])
                firings.append(
                    {
                        "row": row + int(i),
                        "value": float(values[i, slot]),
                        "document": names[document],
                        "position": int(position[i]),
                        "token": codec.text([int(tokens[i])]),
                        "before": codec.text(ids[first:at]) if at >= 0 else "",
                        "after": codec.text(ids[at + 1 : last]) if at >= 0 else "",
                    }
                )
            row += shard.n_rows
    return sorted(firings, key=lambda firing: (-firing["value"], firing["row"]))


@pytest.fixture(scope="module")
def busiest(analysis: Path) -> int:
    return int(np.argmax(Analysis(analysis).fires))


def test_firings_are_those_of_a_scan_of_all_codes(analysis: Path, codes: Path, busiest: int) -> None:
    opened, store = Analysis(analysis), CodeStore(codes)
    by_firings = np.argsort(-opened.fires)
    for feature in (busiest, int(by_firings[len(by_firings) // 4]), int(by_firings[-1])):
        result = feature_firings(opened, feature)
        assert result["firings"] == scanned(store, feature)
        assert result["n_firings"] == len(result["firings"]) == opened.fires[feature]
    assert opened.fires[busiest] > 50


def test_a_limit_gives_the_strongest(analysis: Path, codes: Path, busiest: int) -> None:
    result = feature_firings(Analysis(analysis), busiest, limit=3)
    assert result["firings"] == scanned(CodeStore(codes), busiest)[:3]
    assert result["n_firings"] > 3


def test_one_read_of_the_index_gives_all_firings(analysis: Path, busiest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    entries = FeatureIndex._entries
    monkeypatch.setattr(FeatureIndex, "_entries", lambda self, a, b: asked.append((a, b)) or entries(self, a, b))
    monkeypatch.setattr("pipelines.codes.code_store.read_codes", lambda *_: pytest.fail("the codes are not scanned"))
    n = feature_firings(Analysis(analysis), busiest)["n_firings"]
    assert [last - first for first, last in asked] == [n]


def test_a_terminal_shows_50_and_json_all(analysis: Path, busiest: int) -> None:
    everything = json.loads(invoke("feature", analysis, busiest, "--firings", "--json").stdout)
    n = everything["n_firings"]
    assert len(everything["firings"]) == n > 50
    for arguments, shown in (((), 50), (("--top", 7), 7), (("--top", n + 9), n)):
        lines = invoke("feature", analysis, busiest, "--firings", *arguments).stdout.splitlines()
        assert len(lines) == 2 + shown
    assert len(json.loads(invoke("feature", analysis, busiest, "--firings", "--top", 2, "--json").stdout)["firings"]) == 2


def test_the_firings_token_is_in_brackets(analysis: Path, busiest: int) -> None:
    result = feature_firings(Analysis(analysis), busiest, limit=1)
    (firing,) = result["firings"]
    line = firings_lines(result)[-1]
    assert line.split()[0] == f"{firing['value']:.4g}"
    assert firing["document"] in line
    assert "[" in line.partition(": ")[2]


def test_codes_that_were_moved_are_named(analysis: Path, codes: Path, busiest: int, tmp_path: Path) -> None:
    moved = shutil.copytree(codes, tmp_path / "moved")
    result = invoke("feature", analysis, busiest, "--firings", "--codes", moved, "--json")
    assert json.loads(result.stdout)["firings"] == feature_firings(Analysis(analysis), busiest)["firings"]
    assert json.loads(result.stdout)["codes"] == str(moved)


def test_codes_without_an_index_are_one_clear_line(analysis: Path, codes: Path, tmp_path: Path) -> None:
    own = shutil.copytree(codes, tmp_path / "codes")
    (own / "commits/index.json").unlink()
    result = invoke("feature", analysis, 0, "--firings", "--codes", own)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (f"error: {own}: has no feature index; run `encode` again with the same arguments to make it.\n")
    with pytest.raises(IncompleteStore):
        feature_firings(Analysis(analysis), 0, str(own))


def test_what_cannot_be_shown_is_refused(analysis: Path, store: Path, codes: Path, tmp_path: Path) -> None:
    opened = Analysis(analysis)
    with pytest.raises(InputError, match="choose 0 to 63"):
        feature_firings(opened, 64)
    with pytest.raises(InputError, match="at least 1"):
        feature_firings(opened, 0, limit=0)
    opened.record = replace(opened.record, snapshot="f" * 16)
    with pytest.raises(IdentityMismatch):
        feature_firings(opened, 0, str(codes))
    missing = invoke("feature", analysis, 0, "--firings", "--codes", tmp_path / "nowhere")
    assert missing.stderr.startswith(f"error: {tmp_path / 'nowhere'}: not a store")
    assert invoke("feature", analysis, 0, "--top", 3).exit_code == 2
    assert invoke("feature", analysis, 0, "--codes", codes).exit_code == 2
    assert invoke("feature", analysis, 0, "--firings", "--top", 0).exit_code == 1
