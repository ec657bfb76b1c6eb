"""What a run says while it works: a live line on a terminal, log lines elsewhere, or JSON."""

import contextlib
import json
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.status import Status

_LINE_EVERY_S = 10.0
_FAILURES_SHOWN = 20


class Events:
    """Receives the events of a run; as JSON, one object per line on stdout and no prose."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        if as_json:
            # Ray prints remarks of its own on stdout, from threads and at its end too: from here
            # on, what is written there goes to stderr, and only events go to the real one.
            sys.stdout.flush()
            self.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
            os.dup2(2, 1)
        self.console = Console(stderr=True, highlight=False)
        self.status: Status | None = None
        self.last_line = 0.0
        self.started = time.monotonic()
        self.failures = 0

    def __call__(self, name: str, **fields: Any) -> None:
        """One event: see docs/events.md."""
        if self.as_json:
            line = {"event": name, "time": round(time.time(), 3), **fields}
            with contextlib.suppress(BrokenPipeError):  # nobody listens any more
                print(json.dumps(line), file=self.stdout, flush=True)
            return
        show = getattr(self, f"_{name}", None)
        if show is not None:
            show(**fields)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.status is not None:
            self.status.stop()
            self.status = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _run_started(self, found: int, output: str, **_: Any) -> None:
        self._say(f"{found} candidates; results go to {output}")

    def _reopened(self, units: int) -> None:
        self._say(f"{units} failed units are open again")

    def _planned(
        self, items: int, frames: int, failed_items: int, skipped: int, **rest: Any
    ) -> None:
        left_out = f", {skipped} files that are no media left out" if skipped else ""
        unread = f", {failed_items} unreadable" if failed_items else ""
        twice = f", {rest['duplicates']} named twice" if rest.get("duplicates") else ""
        self._say(f"planned {items} items{unread}, {frames} frames{left_out}{twice}")
        if gone := rest.get("gone"):
            self._say(
                f"{gone} items of the last run are not in this catalog: scores/ will be without "
                "them. To keep several catalogs, give each an output of its own."
            )

    def _scorers_lost(self, units_open: int) -> None:
        self._say(f"scoring processes were lost; going on with {units_open} units")

    def _progress(self, units_done: int, units_planned: int, frames: int, failed: int) -> None:
        seconds = time.monotonic() - self.started
        text = (
            f"{units_done} of {units_planned} units, {frames} frames, {failed} failed, "
            f"{seconds:.0f} s"
        )
        if self.console.is_terminal:
            if self.status is None:
                self.status = self.console.status(text)
                self.status.start()
            self.status.update(text)
        elif time.monotonic() - self.last_line >= _LINE_EVERY_S:
            self.last_line = time.monotonic()
            self._say(text)

    def _item_failed(self, message: str, code: str, **_: Any) -> None:
        self.failures += 1
        if self.failures <= _FAILURES_SHOWN:
            self._say(f"failed ({code}): {message}")
        elif self.failures == _FAILURES_SHOWN + 1:
            self._say("more failed: see failures/")

    def _finished(self, **summary: Any) -> None:
        self.close()
        codes = ", ".join(f"{n} {code}" for code, n in summary["failed_by_code"].items())
        partial = f" ({summary['partial']} partial)" if summary["partial"] else ""
        self._say(
            f"{summary['items']} items: {summary['scored']} scored{partial}, "
            f"{summary['failed']} failed{f': {codes}' if codes else ''}"
        )
        if summary["frames_scored"]:
            self._say(
                f"{summary['frames_scored']} frames in {summary['seconds']:.0f} s, "
                f"{summary['frames_per_s']} a second while scoring; {summary['advice']}"
            )
        else:
            self._say(f"nothing new to score, {summary['seconds']:.0f} s")
        for model in summary["model"].split(","):
            self._say(f"scores: {summary['output']}/scores/{model}.parquet")

    def _evaluated(self, output: str, scatter: str | None, **found: Any) -> None:
        left_out = f", {found['n_failed']} failed and left out" if found["n_failed"] else ""
        self._say(f"{found['n_scored']} of {found['n_rated']} rated items compared{left_out}")
        if scatter is None:
            self._say("no scatter.png: it needs matplotlib (pip install -e '.[evaluate]')")
        self._say(f"report: {output}/evaluation.md")


def flush() -> None:
    """Results before exit codes, also into a pipe."""
    sys.stdout.flush()
