"""The live view of `helena watch`: looks at everything once a second and draws what has changed.

To look costs a fraction of a millisecond, to draw some ten of them. So the picture is drawn only
when a look differs from the last one, and an idle view costs next to nothing.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec.structs import replace

from helena_cli.batch.ledger import KEPT_FLUSHES, Flusher, FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.cli import render
from helena_cli.cli.charts import ASCII_BARS, BARS, History
from helena_cli.cli.checks import HEARTBEAT_SECONDS, Check
from helena_cli.cli.picture import compose
from helena_cli.cli.seen import Seen
from helena_cli.documents.watch_state import WatchState
from helena_cli.errors import HelenaError

if TYPE_CHECKING:
    from rich.live import Live

    from helena_cli.runtime import Runtime

log = logging.getLogger(__name__)

#: Seconds between two looks.
LOOK_SECONDS = 1.0

#: Seconds between two rounds of the checks, which ask the database: sooner while one complains.
CHECK_SECONDS = 30.0
CHECK_AGAIN_SECONDS = 10.0

#: A database that is busy for a moment, as at the start, is not worth a word.
TRIES = 3

#: How long the end waits for a check that is under way, seconds.
PATIENCE = 1.0


class Look:
    """Reads what there is to see, from a connection of its own to the spool."""

    def __init__(self, runtime: "Runtime", state: Callable[[], WatchState]) -> None:
        self._runtime = runtime
        self._state = state
        self._spool: Spool | None = None
        self._history = History()
        self._flushes: deque[FlushRecord] = deque(maxlen=KEPT_FLUSHES)
        self._last = 0
        self._seen: Seen | None = None

    def close(self) -> None:
        """Close the spool."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def __call__(self, checks: Sequence[Check], unchecked: str | None = None) -> Seen:
        """What is there now. Raises HelenaError only when there never was anything to see."""
        try:
            self._seen = replace(self._read(), checks=tuple(checks), unchecked=unchecked)
        except HelenaError as error:
            if self._seen is None:
                raise
            return replace(self._seen, trouble=f"{error} {error.remedy}")
        return self._seen

    def _read(self) -> Seen:
        if self._spool is None:
            self._spool = Spool.open(self._runtime.spool.path)
        queue, flusher = self._spool.queue(), self._spool.flusher()
        fresh = self._spool.recent_flushes(self._last)
        if fresh:
            self._last = fresh[-1][0]
            self._flushes.extendleft(record for _, record in fresh)
        now = time.time()
        self._history.add(queue, [record for _, record in fresh], now)
        running = self._runtime.flusher_running()
        return Seen(
            target=self._runtime.target.label,
            queue=replace(queue, oldest_seconds=_shown(queue.oldest_seconds), spool_bytes=0),
            lanes=tuple(lane for lane in self._spool.lanes() if lane.reason),
            flusher=flusher.pid if flusher else None,
            flusher_running=running,
            flusher_here=flusher is not None and flusher.pid == os.getpid(),
            silence=_silence(flusher, now) if running else None,
            flushes=tuple(self._flushes),
            series=self._history.series(now),
            watch=self._state(),
        )


def _silence(flusher: Flusher | None, now: float) -> float | None:
    """How long the flusher gave no sign of life, when that is too long."""
    silence = now - flusher.heartbeat if flusher else 0.0
    return _shown(silence) if silence > HEARTBEAT_SECONDS else None


def _shown(seconds: float | None) -> float | None:
    """From a minute on minutes are shown: an old queue alone need not be drawn every second."""
    return seconds if seconds is None or seconds < 60 else seconds // 60 * 60


class LiveView:
    """Shows queue, flushes, documents and checks on a terminal while the block runs.

    `state` is asked at every look; `checks` now and then, on a thread of its own, for the database
    may be slow to answer. What is logged meanwhile stands above the picture.
    """

    def __init__(
        self,
        runtime: "Runtime",
        state: Callable[[], WatchState],
        checks: Callable[[], Sequence[Check]] | None = None,
    ) -> None:
        self._look = Look(runtime, state)
        self._ask = checks
        self._checks: Sequence[Check] = ()
        self._unchecked: str | None = None
        self._tries = 0
        self._drawn: tuple[Seen, tuple[int, int]] | None = None
        self._live: Live | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @staticmethod
    def possible() -> bool:
        """Whether stdout is a terminal on which lines can be drawn anew."""
        return sys.stdout.isatty() and not render.console().is_dumb_terminal

    def __enter__(self) -> "LiveView":
        from rich.live import Live

        # A stderr that goes elsewhere stays there.
        self._live = Live(
            console=render.console(), auto_refresh=False, redirect_stderr=sys.stderr.isatty()
        )
        self._live.start()
        # Whatever happens to this process, it cannot leave a terminal without a cursor.
        self._live.console.show_cursor(True)
        self._guarded(self._draw)
        self._threads = [threading.Thread(target=self._run, name="helena-live", daemon=True)]
        if self._ask is not None:
            self._threads.append(
                threading.Thread(target=self._run_checks, name="helena-checks", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        try:
            # How it ended stays on the screen.
            self._guarded(self._draw)
        finally:
            self._look.close()
            # The terminal itself may be gone.
            with suppress(OSError):
                if self._live is not None:
                    self._live.stop()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._guarded(self._draw)

    def _run_checks(self) -> None:
        while not self._stop.is_set():
            self._guarded(self._check)
            ill = any(check.status in {"warn", "critical"} for check in self._checks)
            soon = ill or self._tries > 0
            self._stop.wait(CHECK_AGAIN_SECONDS if soon else CHECK_SECONDS)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A view that fails once must not end the watching."""
        try:
            work()
        except OSError:
            # The terminal is gone; nobody sees the picture, and nobody would read of it.
            log.debug("the terminal cannot be written to", exc_info=True)
        except HelenaError as error:
            log.warning("%s %s", error, error.remedy)
        except Exception:
            log.exception("the live view failed; it is drawn again")

    def _check(self) -> None:
        if self._ask is None:
            return
        self._tries += 1
        try:
            self._checks, self._tries, self._unchecked = tuple(self._ask()), 0, None
        except HelenaError as error:
            log.debug("the checks could not be made: %s", error)
            self._unchecked = str(error) if self._tries >= TRIES else None

    def _draw(self) -> None:
        """Look, and draw when something is other than before."""
        from rich.console import Group

        if self._live is None:
            return
        console, seen = self._live.console, self._look(self._checks, self._unchecked)
        size = console.size
        if self._drawn == (seen, size):
            return
        if self._drawn is not None and size != self._drawn[1]:
            # The terminal has folded the old lines anew, and it is unknown where they begin.
            console.clear()
        bars = BARS if console.encoding.startswith("utf") else ASCII_BARS
        self._live.update(Group(*compose(seen, console, bars=bars)), refresh=True)
        self._drawn = (seen, size)
