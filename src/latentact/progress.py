"""Progress reports: a bar with rate and remaining time on a terminal, log lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)


class Progress:
    """Report progress: `with Progress("decoding", 1000, "frames") as p: p.advance(10)`.

    Args:
        what: activity, such as "decoding".
        total: number of steps; may be an estimate. 0: unknown.
        unit: plural name of a step, such as "frames".
        done: steps completed by an earlier run.
        every_s: seconds between log lines.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, every_s: float = 10.0) -> None:
        """Create the report; it is displayed inside the `with` block only."""
        self._what = what
        self._total = total
        self._unit = unit
        self._done = self._initial = done
        self._every_s = every_s
        self._start_time = self._last_log_time = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total or None, completed=done, rate="")

    def __enter__(self) -> Progress:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar and log the total."""
        if self._bar:
            self._bar.stop()
        if error is None and self._done > self._initial:
            logger.info("%s: %d %s (%s)", self._what, self._done, self._unit, self._rate())

    def advance(self, steps: int) -> None:
        """Add `steps` completed steps."""
        self._done += steps
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._last_log_time > self._every_s:
            self._last_log_time = time.monotonic()
            if not self._total:
                logger.info("%s: %d %s (%s)", self._what, self._done, self._unit, self._rate())
                return
            remaining_s = max(0, self._total - self._done) / self._per_second()
            logger.info(
                "%s: %d of %d %s (%s, %s left)",
                self._what,
                self._done,
                self._total,
                self._unit,
                self._rate(),
                duration(remaining_s),
            )

    def _per_second(self) -> float:
        return max(self._done - self._initial, 1e-9) / max(time.monotonic() - self._start_time, 1e-9)

    def _rate(self) -> str:
        rate = self._per_second()
        if rate < 1:
            return f"{1 / rate:.1f} s for each"
        return f"{rate:.0f} {self._unit}/s" if rate >= 10 else f"{rate:.1f} {self._unit}/s"


def duration(seconds: float) -> str:
    """Format a duration: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
