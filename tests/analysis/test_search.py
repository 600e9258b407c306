"""Looking features up in an analysis: the features that fire on a text, read without more than one feature needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.errors import InputError
from pipelines.analysis.reader import FINDINGS, Analysis
from pipelines.analysis.search import search, search_lines


@pytest.fixture(scope="module")
def opened(analysis: Path) -> Analysis:
    return Analysis(analysis)


def by_definition(analysis: Analysis, tokens: list[int]) -> list[tuple[int, float]]:
    """(feature, F1) of every feature that fires on any of some tokens, best first."""
    counts = analysis.token_counts.toarray()[:, tokens].sum(axis=1)
    rows = analysis.token_rows[tokens].sum()
    f1 = {f: 2 * counts[f] / (analysis.fires[f] + rows) for f in range(analysis.n_features) if counts[f]}
    return sorted(f1.items(), key=lambda pair: (-pair[1], pair[0]))


def commonest(analysis: Analysis) -> int:
    return int(np.argmax(analysis.token_rows))


def test_the_features_of_a_token_are_the_dense_tables_best(opened: Analysis) -> None:
    token = commonest(opened)
    found = search(opened, opened.token_texts[token], 5)
    (result,) = found["results"]
    assert [t["token"] for t in found["tokens"]] == [token]
    expected = by_definition(opened, [token])[:5]
    assert len(expected) == 5
    assert [(f["feature"], pytest.approx(f["f1"])) for f in result["features"]] == expected
    for row in result["features"]:
        count = int(opened.token_counts[row["feature"], token])
        share = count / opened.fires[row["feature"]]
        assert row["rows"] == count
        assert row["precision"] == pytest.approx(share)
        assert row["recall"] == pytest.approx(count / opened.token_rows[token])
        assert row["lift"] == pytest.approx(share / (opened.token_rows[token] / opened.n_rows))


def test_of_several_tokens_the_last_one_and_any_of_them_are_asked(opened: Analysis) -> None:
    most = np.argsort(-opened.token_rows)[:40].tolist()
    texts = [opened.token_texts[t] for t in most]
    text = next(a + b for a in texts for b in texts if a != b and len(opened.token_ids(a + b)) == 2)
    ids = opened.token_ids(text)
    last, either = search(opened, text, 4)["results"]
    assert [f["feature"] for f in last["features"]] == [f for f, _ in by_definition(opened, ids[-1:])[:4]]
    assert [f["feature"] for f in either["features"]] == [f for f, _ in by_definition(opened, ids)[:4]]
    assert either["rows"] == opened.token_rows[ids].sum()


def test_a_token_that_is_not_in_the_corpus_has_no_features(opened: Analysis) -> None:
    token = next(
        t for t in np.flatnonzero(opened.token_rows == 0).tolist() if opened.token_ids(opened.token_texts[t]) == [t]
    )
    found = search(opened, opened.token_texts[token], 3)
    assert found["results"][0]["features"] == []
    assert "  no feature fires there" in search_lines(found)


def test_rules_that_quote_the_text_or_have_it_as_a_word_are_listed(analysis: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(analysis, tmp_path / "analysis"))
    scores = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "threshold": 0.5, "kind": "place"}
    rules = ["the token after ` the`", "inside a string", "the token `string`", "a substring", "the token `the`"]
    (own / FINDINGS).write_text(json.dumps({"findings": [{"feature": i, "rule": r, **scores} for i, r in enumerate(rules)]}))
    opened = Analysis(own)
    assert [rule["feature"] for rule in search(opened, " the", 5)["rules"]] == [0]
    assert [rule["feature"] for rule in search(opened, "the", 5)["rules"]] == [4]
    assert [rule["feature"] for rule in search(opened, "string", 5)["rules"]] == [1, 2]
    assert [rule["feature"] for rule in search(opened, "string", 1)["rules"]] == [1]
    assert search_lines(search(opened, "string", 5))[-1].endswith("the token `string`")


def test_a_text_without_tokens_is_refused(opened: Analysis) -> None:
    with pytest.raises(InputError, match="text '': has no tokens; pass at least one character"):
        search(opened, "", 3)
    with pytest.raises(InputError, match="top 0: need at least 1"):
        search(opened, "a", 0)


def test_a_card_reads_slices_and_no_whole_matrix(analysis: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.analysis.cards import feature_card

    opened = Analysis(analysis)
    feature = int(np.argmax(opened.fires))
    expected = json.dumps(feature_card(opened, feature))
    read: list[str] = []
    get = Analysis._get

    def recording(self: Analysis, name: str, *shape: int | None) -> Any:
        read.append(name)
        return get(self, name, *shape)

    monkeypatch.setattr(Analysis, "_get", recording)
    again = Analysis(analysis)
    assert json.dumps(feature_card(again, feature)) == expected
    assert read
    assert not {name.split("/")[0] for name in read} & {"cooccurrence", "examples"}
    assert not {"tokens/count", "tokens/columns"} & set(read)
