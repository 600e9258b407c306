"""The page of an analysis: whole in itself, true to the numbers, and safe from the text it shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actstore.errors import DamagedStore, InputError, NotAStore, OutputExists
from actstore.folder import Folder
from actstore.sealed_folder import seal_folder
from pipelines.analysis.arrays import create_arrays
from pipelines.analysis.reader import Analysis
from pipelines.analysis.record import AnalysisRecord
from pipelines.report.stage import ReportConfig, report
from pipelines.report.views import explorer, frequency
from pipelines.statistics import frequency_bands

HOSTILE = "</script><img src=x onerror=document.documentElement.dataset.owned=1>"
TEXTS = ["self", " self", "\n", "\t", "    ", "def", "\r", "é", "<!--<script>", "'\"&amp;", "\u2028\u202e", HOSTILE]
N_ROWS, N_FEATURES, N_EXAMPLES, BEFORE, AFTER = 1000, 9, 3, 4, 2
FIRES = np.array([950, 500, 100, 40, 10, 3, 1, 0, 0])
FINDING = {"feature": 3, "rule": f"after `def` {HOSTILE}", "precision": 0.9, "recall": 0.8, "f1": 0.847, "threshold": 0.25}
OF_ANOTHER_ANALYSIS = json.dumps({"findings": [FINDING | {"feature": 99}]})

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
]


def write_analysis(folder: Path) -> Analysis:
    """A small analysis: every live feature f peaks at f + 1, and its examples walk through all the token texts."""
    rng = np.random.default_rng(0)
    live = FIRES > 0
    width = BEFORE + 1 + AFTER
    values = rng.random((N_FEATURES, N_EXAMPLES, width), np.float32) * (rng.random((N_FEATURES, N_EXAMPLES, width)) < 0.5)
    values[:, :, BEFORE] = (1 - 0.1 * np.arange(N_EXAMPLES)) * (np.arange(N_FEATURES)[:, None] + 1)
    tokens = (np.arange(values.size).reshape(values.shape) % len(TEXTS)).astype(np.int32)
    tokens[:, 0, : BEFORE + 1] = -1  # the start token of a window fires
    values[:, 0, :BEFORE] = 0
    values[~live] = 0
    together = sp.csr_array(np.minimum.outer(FIRES, FIRES) * (1 - np.eye(N_FEATURES, dtype=np.int64)))
    on_token = sp.csr_array(np.stack([FIRES // (i + 2) for i in range(len(TEXTS))], axis=1))
    arrays: dict[str, dict[str, Any]] = {
        "features": {
            "fires": FIRES,
            "frequency": FIRES / N_ROWS,
            "mean": np.where(live, np.arange(N_FEATURES) / 3 + 0.123456789, 0),
            "peak": np.where(live, np.arange(N_FEATURES) + 1, 0).astype(np.float32),
        },
        "examples": {
            "value": values[:, :, BEFORE],
            "document": np.arange(N_FEATURES * N_EXAMPLES).reshape(N_FEATURES, N_EXAMPLES) % 2,
            "tokens": tokens,
            "values": values,
        },
        "rows": {"tokens": np.full(len(TEXTS), N_ROWS), "documents": np.array([N_ROWS, 0])},
        "documents": {"name": np.frombuffer(f"lib/abc.py\n{HOSTILE}".encode(), np.uint8)},
    }
    for group, matrix in (("cooccurrence", together), ("tokens", on_token)):
        tile = {"starts": matrix.indptr, "columns": matrix.indices, "count": matrix.data}
        arrays[f"{group}/tiles/000000"] = tile | {"total": matrix.data / 2}
        arrays[group] = {"tile_starts": np.array([0, N_FEATURES])}
    for group, columns in arrays.items():
        create_arrays(str(folder), group, columns)

    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    tokenizer = Tokenizer(models.WordLevel({to_alphabet(text)[0][0]: i for i, text in enumerate(TEXTS)}, unk_token="def"))
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    record = AnalysisRecord(
        codes_id="0" * 16,
        snapshot="0" * 16,
        store_id="store0123",
        run_id="run4567",
        site="resid_post.2",
        **dict.fromkeys(("codes", "run", "store"), "moved"),
        model=HOSTILE,
        corpus="https://example.org/*.py",
        n_rows=N_ROWS,
        n_features=N_FEATURES,
        k=8,
        n_vocabulary=len(TEXTS),
        context=0,
        n_documents=2,
        n_parts=0,
        bands=frequency_bands(FIRES, N_ROWS),
        focus=BEFORE,
        example_width=values.shape[2],
        example_slots={"top": (0, N_EXAMPLES)} | dict.fromkeys(("strata", "random"), (N_EXAMPLES, N_EXAMPLES)),
        quantiles=[],
        **dict.fromkeys(("seed", "bos_token_id", "separator_token_id", "min_together", "pairs", "pairs_kept"), 0),
        within="row",
    )
    (folder / "analysis.json").write_text(json.dumps(record.value()))
    seal_folder(Folder(folder), "analysis", "analysis.json", whole=("data.zarr", "tokenizer"))
    return Analysis(folder)


class Page(HTMLParser):
    """What a browser's parser makes of the page: its elements, their attributes, and the text inside each."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def inside(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag and text.strip()]

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.inside("script")[0])
        return data


@pytest.fixture
def analysis(tmp_path: Path) -> Analysis:
    return write_analysis(tmp_path / "an")


def made(analysis: Analysis, out: str = "report.html", **options: Any) -> Page:
    path = analysis.path.parent / out
    result = report(ReportConfig(analysis.path, path, **options))
    assert result == {"page": str(path), "features": N_FEATURES, "bytes": path.stat().st_size}
    return Page(path)


def test_the_page_loads_nothing_from_elsewhere(analysis: Analysis) -> None:
    html = made(analysis)
    assert {tag for tag, _ in html.elements}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    for _, attributes in html.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    own_code = html.inside("style") + html.inside("script")[1:]
    for word in ("@import", "url(", "http:", "https:", "fetch(", "XMLHttpRequest", "innerHTML"):
        assert not any(word in text for text in own_code)
    policy = next(attributes["content"] for tag, attributes in html.elements if attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_data_in_the_page_equals_the_analysis(analysis: Analysis) -> None:
    data = made(analysis).data
    assert data["fires"] == FIRES.tolist()
    assert data["mean"] == pytest.approx(analysis.mean.tolist(), rel=1e-5)
    assert data["peak"] == pytest.approx(analysis.peak.tolist(), rel=1e-5)
    assert data["n_rows"] == N_ROWS
    text = data["vocabulary"]
    assert sorted(data["details"], key=int) == [str(i) for i in np.flatnonzero(FIRES)]
    for feature, (tokens, partners, examples) in data["details"].items():
        i = int(feature)
        expected = analysis.top_tokens(i, 10)
        assert [(text[t], count) for t, count, _ in tokens] == [(token.text, token.count) for token in expected]
        assert [count / rows for _, count, rows in tokens] == pytest.approx([token.recall for token in expected])
        lift = [together * N_ROWS / (data["fires"][i] * data["fires"][other]) for other, together in partners]
        assert [(*pair, pytest.approx(value)) for pair, value in zip(partners, lift, strict=True)] == analysis.partners(i, 8)
        for (value, document, focus, shown, levels), example in zip(examples, analysis.examples(i), strict=True):
            assert (value, data["documents"][document]) == (pytest.approx(example.value, rel=1e-5), example.document)
            outside = example.focus - focus
            assert [text[t] for t in shown] == list(example.tokens[outside:])
            assert not any(example.tokens[:outside])
            step = data["peak"][i] / 99
            assert [level * step for level in levels] == pytest.approx(example.values[outside:], abs=step)
            assert [level > 0 for level in levels] == [v > 0 for v in example.values[outside:]]


def test_the_bands_sum_to_the_number_of_features(analysis: Analysis) -> None:
    html = made(analysis)
    counts = {name: html.data["bands"].count(str(i)) for i, name in enumerate(html.data["band_names"])}
    assert counts == analysis.record.bands
    assert sum(counts.values()) == N_FEATURES
    cells = html.inside("td")
    assert [int(cells[cells.index(name) + 2]) for name in counts] == list(counts.values())


def test_the_histogram_counts_each_live_feature_once() -> None:
    density = frequency.frequency_density(FIRES, N_ROWS)
    assert sum(density["counts"]) == (FIRES > 0).sum()
    assert density["decades"] == [-3, -2, -1, 0]
    assert sum(frequency.frequency_density(np.zeros(4, np.int64), N_ROWS)["counts"]) == 0


def test_no_text_can_leave_its_place(analysis: Analysis) -> None:
    (analysis.path / "findings.json").write_text(json.dumps({"findings": [FINDING]}))
    html = made(analysis)
    assert HOSTILE in html.data["vocabulary"]
    assert HOSTILE in html.data["documents"]
    assert len(html.inside("script")) == 2
    assert not any(name.startswith("on") for _, attributes in html.elements for name in attributes)
    raw = html.inside("script")[0]
    assert not any(character in raw for character in "<>&")


def test_findings_are_listed_in_the_order_of_their_file(analysis: Analysis) -> None:
    assert "Features that follow a rule" not in made(analysis).inside("h2")
    better = FINDING | {"feature": 5, "rule": "in a comment", "f1": 0.912}
    (analysis.path / "findings.json").write_text(json.dumps({"findings": [FINDING, better], "made_by": "a later stage"}))
    html = made(analysis, "with_findings.html")
    assert "Features that follow a rule" in html.inside("h2")
    assert [attributes["href"] for tag, attributes in html.elements if tag == "a"] == ["#f3", "#f5"]
    assert [float(text) for text in html.inside("td") if text in ("0.912", "0.847")] == [0.847, 0.912]
    assert html.data["findings"] == [[3, FINDING["rule"], 0.847], [5, "in a comment", 0.912]]


@pytest.mark.parametrize("findings", ["{", "[]", '{"findings": 1}', '{"findings": [{"feature": 3}]}', OF_ANOTHER_ANALYSIS])
def test_damaged_findings_are_named(analysis: Analysis, findings: str) -> None:
    (analysis.path / "findings.json").write_text(findings)
    with pytest.raises(DamagedStore, match=r"findings\.json"):
        made(analysis)
    assert not (analysis.path.parent / "report.html").exists()


def test_only_the_most_frequent_features_keep_their_details(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "DETAILED_FEATURES", 3)
    html = made(analysis, examples=2)
    assert list(html.data["details"]) == ["0", "1", "2"]
    assert len(html.data["fires"]) == N_FEATURES
    assert all(len(examples) == 2 for _, _, examples in html.data["details"].values())
    assert any("3 most frequent features" in text and "4 rarer live ones" in text for text in html.inside("p"))


def test_an_existing_output_is_refused_and_untouched(analysis: Analysis) -> None:
    out = analysis.path.parent / "report.html"
    out.write_text("mine")
    with pytest.raises(OutputExists, match=r"report\.html"):
        report(ReportConfig(analysis.path, out))
    assert out.read_text() == "mine"


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="examples 0"):
        ReportConfig(tmp_path, tmp_path / "r.html", examples=0)
    with pytest.raises(NotAStore):
        report(ReportConfig(tmp_path, tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_the_chosen_feature_without_an_error(analysis: Analysis, tmp_path: Path) -> None:
    (analysis.path / "findings.json").write_text(json.dumps({"findings": [FINDING]}))
    made(analysis)
    address = (tmp_path / "report.html").as_uri() + "#f3"
    command = [str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
    dom = subprocess.run(command, capture_output=True, check=True, timeout=300).stdout
    (tmp_path / "dom.html").write_bytes(dom)
    html = Page(tmp_path / "dom.html")
    root = next(attributes for tag, attributes in html.elements if tag == "html")
    assert root.get("data-ready") == "1"
    assert root.keys().isdisjoint({"data-error", "data-owned"})
    assert "Feature 3" in html.inside("h2")
    assert "img" not in {tag for tag, _ in html.elements}

    classes = [attributes.get("class") for tag, attributes in html.elements if tag in ("tr", "figure", "span", "mark")]
    assert classes.count("focus") == N_EXAMPLES
    assert classes.count("chosen") == 1
    shown = "".join(text for _, text in html.texts)
    assert HOSTILE in shown[shown.index("Strongest firings") :]
    assert {"·", "⏎", "⇥", "\\r", "\\u2028", "\\u202e", "⟨start⟩"} <= set(html.inside("mark"))
    assert f"Follows a rule: {FINDING['rule']} (F1 0.847)" in html.inside("p")
