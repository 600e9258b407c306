"""In: an analysis. Out: one self-contained HTML page.

The page loads nothing: style, script and data are inside it. `frame.html` is the page around the views of `views/`; the
data is one JSON object, to which each view adds what its script reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from actstore.errors import InputError, OutputExists
from actstore.files import publish_bytes, require_free_space
from actstore.lease import held_file
from pipelines.analysis.reader import Analysis
from pipelines.report.view import joined_data, pieces, views
from pipelines.shared.visible_text import visible


@dataclass(frozen=True)
class ReportConfig:
    """What `report` is asked for; the names are the command's options."""

    analysis: str | Path
    out: Path
    examples: int = 5

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise InputError(f"examples {self.examples}: need at least 1.")


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page of an analysis; returns its path, the number of features and its length in bytes.

    Raises OutputExists, NotAStore (no analysis there), DamagedStore (unreadable findings) or NoSpace; nothing is
    written then.
    """
    _require_free(config.out)
    analysis = Analysis(config.analysis)
    with held_file(config.out):
        _require_free(config.out)
        page = render(analysis, config.examples).encode()
        require_free_space(config.out, len(page), "the page")
        publish_bytes(config.out, page)
    return {"page": str(config.out), "features": analysis.n_features, "bytes": len(page)}


def _require_free(out: Path) -> None:
    if out.exists():
        raise OutputExists(f"{out}: exists; choose another --out, or move it away.")


def render(analysis: Analysis, n_examples: int) -> str:
    """The page as text: the frame around every view."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # jinja2's tojson escapes < > & ' on top of this, so that no token can end the script element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    environment.filters["visible"] = visible
    record = analysis.record
    return environment.get_template("frame.html").render(
        record=record,
        views=[pieces(view, environment, {"record": record, **view.shown(analysis, n_examples)}) for view in views()],
        data=joined_data(views(), analysis, n_examples),
    )
