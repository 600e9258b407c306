"""What the numbers of the page mean."""

from __future__ import annotations

from pipelines.report.view import View, text_beside

VIEW = View(order=40, template=text_beside(__file__))
