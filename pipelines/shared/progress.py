"""Progress of long work on stderr: a rich bar on a terminal, one plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipelines.shared.visible_text import say, visible

LOG_INTERVAL_S = 10.0


class Tracker:
    """A stage's progress: the units done, and a short note such as `FVE 0.91`."""

    def __init__(self, label: str, total: int, unit: str, bar: Progress | None, *, shown: bool = True):
        self.label, self.total, self.unit, self.done, self._before = label, total, unit, 0, 0
        self._shown = shown
        self._bar = bar
        self._task = bar.add_task(visible(label), total=total, note="") if bar else None
        self._started = self._last = time.monotonic()

    @property
    def rate(self) -> float:
        """Units per second since this process began."""
        return (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)

    def resume(self, n: int) -> None:
        """Note that `n` units were done before this process began."""
        self.done = self._before = n

    def expect(self, n: int) -> None:
        """Add `n` units to the total."""
        self.total += n
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.total)

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        note = f"{rate_text(self.rate)} {self.unit}/s  {visible(note)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif self._shown and (time.monotonic() - self._last >= LOG_INTERVAL_S or self.done >= self.total):
            self._last = time.monotonic()
            if self.done < self.total and self.rate > 0:
                note = f"{duration((self.total - self.done) / self.rate)} left, {note}"
            say(f"{self.label}: {self.done:,} of {self.total:,} {self.unit}  {note}", err=True)


@contextmanager
def track(label: str, total: int, unit: str = "rows", *, shown: bool = True) -> Iterator[Tracker]:
    """Show a stage's progress while the block runs. Where several processes share the work, only one has `shown` true."""
    console = Console(stderr=True, quiet=not shown)
    if not console.is_terminal:
        yield Tracker(label, total, unit, None, shown=shown)
        return
    columns = (
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield Tracker(label, total, unit, bar)


def rate_text(rate: float) -> str:
    """A number with at least two digits.

    >>> rate_text(2226.4), rate_text(9.8), rate_text(0.0432)
    ('2,226', '9.8', '0.043')
    """
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """A duration in the unit that suits its size.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
