"""A view of the page: what it takes from an analysis, and its pieces of style, markup and script.

A view is one module of `views/` that has a `VIEW`. Its template is Jinja text whose blocks go to places of the page's
frame:

    style       rules of its own
    narrow      rules for windows narrower than 60rem
    media       media queries of its own
    body        its markup, below the views before it
    constants   first in the page's script
    state       after `data`, the parsed data of the page
    script      after the functions that the frame offers to all views: make, link, visible, chip and the number formats

Markup is escaped by the template (`autoescape`). Nodes are built by `make`, whose strings become text, so that no text
of a model or a corpus can become markup.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import pipelines.report.views
from actstore.folder_registry import modules_of
from pipelines.analysis.reader import Analysis

PLACES = ("style", "narrow", "media", "body", "constants", "state", "script")

Taken = Callable[[Analysis, int], dict[str, Any]]
"""Values by name, taken from an analysis; the number is how many examples of a feature are shown."""


def nothing(analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """The values of a view that needs none."""
    return {}


@dataclass(frozen=True)
class View:
    """One view. Views stand on the page by rising `order`.

    `shown` gives the template's values, beside `record`, the analysis' own. `data` gives what the script reads, as JSON
    values: they join the page's one data object, where each name belongs to one view.
    """

    order: int
    template: str
    shown: Taken = nothing
    data: Taken = nothing


def text_beside(module: str) -> str:
    """The template of a view that lies beside its module, of the same name: `text_beside(__file__)`."""
    return Path(module).with_suffix(".html").read_text(encoding="utf-8")


@cache
def views() -> list[View]:
    """Every view, in the order of the page."""
    return sorted((module.VIEW for module in modules_of(pipelines.report.views)), key=lambda view: view.order)


def pieces(view: View, environment: jinja2.Environment, values: dict[str, Any]) -> dict[str, Markup]:
    """The view's text for each of PLACES, empty where its template has no such block."""
    template = environment.from_string(view.template)
    assert set(template.blocks) <= set(PLACES), f"blocks {sorted(template.blocks)}: the places are {', '.join(PLACES)}"
    context = template.new_context(values)
    # A block renders with the environment's escaping: its text is markup now.
    return {place: Markup("".join(template.blocks[place](context)) if place in template.blocks else "") for place in PLACES}


def joined_data(chosen: list[View], analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """The page's data: what all views take, each name from one view."""
    joined: dict[str, Any] = {}
    for view in chosen:
        taken = view.data(analysis, n_examples)
        assert joined.keys().isdisjoint(taken), f"two views take {sorted(joined.keys() & taken.keys())}"
        joined |= taken
    return joined
