"""The features that follow a rule, as a table; absent where no stage has looked for any."""

from __future__ import annotations

from typing import Any

from pipelines.analysis.reader import Analysis
from pipelines.report.view import View, text_beside


def shown(analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """The findings, in the order of their file. Raises DamagedStore when the file is not what its stage writes."""
    return {"findings": analysis.findings}


VIEW = View(order=10, template=text_beside(__file__), shown=shown)
