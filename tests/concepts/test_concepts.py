"""Rules of features: counted as a dense table counts them, found where planted, scored where they were not chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tablekit import activations, activations_manifest, codes_manifest, dense_codes, text_table, write_table_store

from actstore.reader import ActivationStore
from benchmarks import baselines
from pipelines.codes.code_store import CodeStore
from pipelines.concepts.labels import read_labels
from pipelines.concepts.python_labels import BIT, LABELS, label_characters
from pipelines.concepts.rules import MIN_FIRINGS, Finding, RuleScores, rule_matrix, rule_name
from pipelines.concepts.scored_units import FIRING_SHARES, ScoredUnits, choose_thresholds
from pipelines.concepts.stage import find_rules
from pipelines.text.codec import TextCodec
from pipelines.text.tokens import TokenTable

PLACE, TOKEN, AFTER = "the name after `def`", "the token `=`", "the token after `(`"
N_DOCUMENTS = 40

Text = tuple[TokenTable, TextCodec, dict[str, bytes]]


def documents() -> dict[str, str]:
    """Small Python sources, all different."""
    return {
        f"module{i}.py": "".join(
            f"def f{i + j}(a, b={j}):\n    return a + {i * j} # {'é' * (j % 3)}\n\nx{j} = f{i + j}(1, {i})\n"
            for j in range(4 + i % 3)
        )
        for i in range(N_DOCUMENTS)
    }


@pytest.fixture(scope="module")
def text(model_folder: Path) -> Text:
    return text_table(documents(), model_folder)


def is_scoring_half(key: int) -> bool:
    return key >= 2**63


@pytest.fixture(scope="module")
def features(text: Text) -> NDArray[np.float32]:
    """(n_tokens, 6) values by place in the token table, from labels found character by character.

    0 follows a rule of place, 1 of the token, 2 of the token before; 3 follows the first only in documents of the
    choosing half, and in the others fires elsewhere; 4 follows it only above half its peak; 5 fires too rarely.
    """
    table, codec, _ = text
    pieces, texts = codec.token_bytes(), codec.token_texts()
    values = np.zeros((len(table.ids), 6), np.float32)
    generator = np.random.default_rng(0)
    for name, key, first, last in zip(table.names, table.keys, table.offsets[:-1], table.offsets[1:] - 1, strict=True):
        source = documents()[name]
        labels = label_characters(source)
        at_byte = np.repeat(labels, [len(character.encode()) for character in source])
        place = 0
        for i in range(first, last):
            piece = pieces[table.ids[i]]
            lead = len(piece) - len(piece.lstrip()) if piece.strip() else 0
            is_name = bool(at_byte[place + lead] & BIT[PLACE])
            before = "" if i == first else texts[table.ids[i - 1]]
            strength = float(generator.uniform(1, 2))
            chooses = not is_scoring_half(int(key))
            values[i] = [
                is_name,
                texts[table.ids[i]] == "=",
                before == "(",
                is_name if chooses else not is_name and i % 7 == 0,
                20 if is_name else i % 3 == 0,
                is_name and name in table.names[:2],
            ]
            values[i] *= strength
            place += len(piece)
    return values


@pytest.fixture(scope="module")
def codes_path(tmp_path_factory: pytest.TempPathFactory, text: Text, features: NDArray[np.float32]) -> Path:
    table, codec, files = text
    manifest = codes_manifest(6, 6, codec)
    return write_table_store(
        tmp_path_factory.mktemp("codes") / "codes", manifest, table, lambda index: dense_codes(features[index]), files
    )


@pytest.fixture(scope="module")
def ranked(codes_path: Path, text: Text, client: Any) -> list[Finding]:
    return find_rules(CodeStore(codes_path), text[1], client)


@pytest.fixture(scope="module")
def findings(ranked: list[Finding]) -> dict[int, Finding]:
    return {finding.feature: finding for finding in ranked}


@pytest.mark.parametrize(("feature", "rule", "kind"), [(0, PLACE, "place"), (1, TOKEN, "token"), (2, AFTER, "after")])
def test_a_feature_that_fires_exactly_on_a_rule_is_found_with_f1_of_one(
    findings: dict[int, Finding], feature: int, rule: str, kind: str
) -> None:
    found = findings[feature]
    assert (found.rule, found.kind) == (rule, kind)
    assert (found.precision, found.recall, found.f1, found.f1_chosen, found.threshold) == (1, 1, 1, 1, 0)
    assert found.firings > 50


def test_a_rule_that_holds_only_where_it_was_chosen_scores_low(findings: dict[int, Finding]) -> None:
    found = findings[3]
    assert found.rule == PLACE
    assert found.f1_chosen > 0.8
    assert found.f1 < 0.1


def test_a_threshold_tells_the_rule_from_weaker_firings(findings: dict[int, Finding], features: NDArray[np.float32]) -> None:
    found = findings[4]
    assert (found.rule, found.f1, found.f1_chosen) == (PLACE, 1, 1)
    weak, strong = features[features[:, 4] < 5, 4].max(), features[features[:, 4] > 5, 4].min()
    assert weak <= found.threshold < strong


def test_a_feature_that_fires_rarely_gets_no_rule(findings: dict[int, Finding], features: NDArray[np.float32]) -> None:
    assert 0 < (features[:, 5] > 0).sum() < MIN_FIRINGS
    assert findings.keys() == {0, 1, 2, 3, 4}


def test_findings_come_by_falling_f1(ranked: list[Finding]) -> None:
    assert [finding.f1 for finding in ranked] == sorted((finding.f1 for finding in ranked), reverse=True)


def test_each_document_is_of_one_half_and_each_token_has_its_labels(
    codes_path: Path, text: Text, features: NDArray[np.float32]
) -> None:
    table, codec, _ = text
    labels = read_labels(CodeStore(codes_path), codec, None)
    (segment,) = labels.segments
    halves = np.array([is_scoring_half(int(key)) for key in table.keys])
    assert 5 < halves.sum() < N_DOCUMENTS - 5
    np.testing.assert_array_equal(segment.half, np.repeat(halves, np.diff(table.offsets)))
    holds = segment.holds.toarray()
    np.testing.assert_array_equal(holds[:, labels.names.index(PLACE)] > 0, features[:, 0] > 0)
    assert not holds[table.offsets[1:] - 1].any()


def test_a_row_has_the_rules_of_its_labels_its_token_and_the_token_before() -> None:
    names = ["a", "b", "\n"]
    holds = np.zeros((3, len(LABELS)), np.int64)
    holds[0, [0, -1]] = holds[2, 3] = 1
    rules = rule_matrix(sp.csr_array(holds), np.array([0, 1, 2]), np.array([2, 0, 1]), 3).tocoo()
    found = sorted((int(row), rule_name(int(rule), LABELS, names)) for row, rule in zip(*rules.coords, strict=True))
    assert set(rules.data.tolist()) == {1}
    assert found == sorted(
        [
            (0, (LABELS[0], "place")),
            (0, (LABELS[-1], "place")),
            (0, ("the token `a`", "token")),
            (0, ("the token after `⏎`", "after")),
            (1, ("the token `b`", "token")),
            (1, ("the token after `a`", "after")),
            (2, (LABELS[3], "place")),
            (2, ("the token `⏎`", "token")),
            (2, ("the token after `b`", "after")),
        ]
    )


# Scores against a dense table

N_ROWS, N_FEATURES, N_VOCABULARY, N_THRESHOLDS = 400, 5, 4, 3
N_RULES = len(LABELS) + 2 * N_VOCABULARY


def random_rows(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """fired (T, n, F), rules (n, R), half (n,); feature 0 is close to rule 2, feature 4 never fires."""
    generator = np.random.default_rng(seed)
    rules = (generator.random((N_ROWS, N_RULES)) < 0.2).astype(np.int64)
    fired = (generator.random((N_THRESHOLDS, N_ROWS, N_FEATURES)) < 0.3).astype(np.int64)
    fired[1, :, 0] = rules[:, 2] ^ (generator.random(N_ROWS) < 0.05)
    fired[:, :, 4] = 0
    return fired, rules, generator.random(N_ROWS) < 0.5


def scores_of(fired: NDArray[np.int64], rules: NDArray[np.int64], half: NDArray[np.bool_], rows: Any) -> RuleScores:
    scores = RuleScores(N_FEATURES, N_RULES, N_THRESHOLDS)
    scores.update([sp.csr_array(matrix[rows]) for matrix in fired], sp.csr_array(rules[rows]), half[rows])
    return scores


def dense_findings(
    fired: NDArray[np.int64], rules: NDArray[np.int64], half: NDArray[np.bool_]
) -> dict[int, tuple[Any, ...]]:
    """feature -> (rule, threshold, F1 chosen, precision, recall, F1, firings), with loops over everything."""
    found: dict[int, tuple[Any, ...]] = {}

    def f1(hits: int, fires: int, holds: int) -> float:
        return 2 * hits / max(fires + holds, 1)

    for feature in range(N_FEATURES):
        best = (0.0, 0, 0)
        for t in range(N_THRESHOLDS):
            own = fired[t, ~half, feature]
            for rule in range(N_RULES):
                score = f1(int(own @ rules[~half, rule]), int(own.sum()), int(rules[~half, rule].sum()))
                if own.sum() >= MIN_FIRINGS and score > best[0]:
                    best = (score, t, rule)
        score, t, rule = best
        if score > 0:
            own, holds = fired[t, half, feature], rules[half, rule]
            hits, fires, n = int(own @ holds), int(own.sum()), int(holds.sum())
            found[feature] = (rule, t, score, hits / max(fires, 1), hits / max(n, 1), f1(hits, fires, n), fires)
    return found


def require_equal_to_dense(scores: RuleScores, seed: int) -> None:
    expected = dense_findings(*random_rows(seed))
    names = [f"t{i}" for i in range(N_VOCABULARY)]
    thresholds = np.arange(N_THRESHOLDS)[:, None] + np.zeros(N_FEATURES)
    found = {
        finding.feature: (
            finding.rule,
            finding.threshold,
            finding.f1_chosen,
            finding.precision,
            finding.recall,
            finding.f1,
            finding.firings,
        )
        for finding in scores.finalize(thresholds, LABELS, names)
    }
    assert found == {feature: (rule_name(rule, LABELS, names)[0], *rest) for feature, (rule, *rest) in expected.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_best_rule_and_its_scores_are_those_of_a_dense_table(seed: int) -> None:
    require_equal_to_dense(scores_of(*random_rows(seed), slice(None)), seed)
    assert dense_findings(*random_rows(seed))[0][:2] == (2, 1)
    assert 4 not in dense_findings(*random_rows(seed))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 3), data=st.data())
def test_any_order_of_merging_gives_the_same_findings(seed: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, N_ROWS - 1), max_size=5), label="cuts"))
    parts = [scores_of(*random_rows(seed), rows) for rows in np.split(np.arange(N_ROWS), cuts)]
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1), label="left"))
        right = parts.pop(data.draw(st.integers(0, len(parts) - 1), label="right"))
        parts.append(left.merge(right))
    require_equal_to_dense(parts[0], seed)


# Raw dimensions


def test_a_rule_planted_in_a_raw_dimension_is_found_in_its_sign(
    text: Text, features: NDArray[np.float32], tmp_path: Path, client: Any
) -> None:
    """Dimension 1 is high on a rule, dimension 2 low on another, dimensions 0 and 3 are noise."""
    table, codec, files = text
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(len(table.ids), 4)).astype(np.float32)
    rows[:, 1] += 20 * features[:, 0]
    rows[:, 2] -= 20 * features[:, 1]
    manifest = activations_manifest(4, codec)
    write_table_store(tmp_path / "store", manifest, table, lambda index: activations(rows[index]), files)
    store = ActivationStore(tmp_path / "store")
    scored = ScoredUnits.of(store, store.site())
    found = {finding.feature: finding for finding in baselines.raw_dimension_findings(tmp_path / "store", client)}
    assert (found[1].rule, found[4 + 2].rule) == (PLACE, TOKEN)
    assert (scored.unit_name(1), scored.unit_name(4 + 2)) == ("+1", "-2")
    assert min(found[1].f1, found[4 + 2].f1) > 0.7
    assert max(found[feature].f1 for feature in (0, 3, 4, 7, 4 + 1, 2)) < 0.5


def test_raw_thresholds_leave_the_shares_they_name_of_the_choosing_half(text: Text, tmp_path: Path, client: Any) -> None:
    table, codec, files = text
    rows = np.random.default_rng(2).normal(size=(len(table.ids), 3)).astype(np.float32)
    manifest = activations_manifest(3, codec)
    write_table_store(tmp_path / "store", manifest, table, lambda index: activations(rows[index]), files)
    store = ActivationStore(tmp_path / "store")
    labels = read_labels(store, codec, None)
    thresholds = choose_thresholds(ScoredUnits.of(store, store.site()), list(labels.segments), client)
    n_train = table.n_train_tokens
    chooses = ~labels.segments[0].half[:n_train] & (table.ids[:n_train] != codec.separator_token_id)
    signed = np.concatenate([rows, -rows], axis=1)[:n_train][chooses]
    for share, bounds in zip(FIRING_SHARES, thresholds, strict=True):
        np.testing.assert_allclose((signed > bounds).mean(axis=0), share, atol=1 / len(signed))
