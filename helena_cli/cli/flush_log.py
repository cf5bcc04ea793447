"""What `helena watch` says where nobody looks at a terminal: a line for each flush, and the log.

Flushes go to stdout and the log to stderr, both as text for people or both as JSON for programs.
"""

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from typing import Any

from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.cli import render
from helena_cli.cli.options import PACKAGE_LOG
from helena_cli.errors import SpoolError

log = logging.getLogger(__name__)

#: Seconds between two looks. The spool remembers some hundred flushes, far more than fit in there.
LOOK_SECONDS = 0.5

#: How long the end waits for a look that is under way, seconds.
PATIENCE = 5.0


class FlushLog:
    """Prints one line for each flush of this host while the block runs, whichever process flushes.

    It reads from a connection of its own, so that it may outlive the engine and print its last
    flush too. A reader that goes away ends the lines, not the program. The log keeps its format
    after the block: what closes later speaks as well.
    """

    def __init__(self, spool: Spool, *, as_json: bool) -> None:
        self._path = spool.path
        self._line = _flush_json if as_json else _flush_text
        self._handler = _Handler()
        self._handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
        self._last = 0
        # The shell may have closed it.
        self._heard = sys.stdout is not None
        self._troubled = False
        self._stop = threading.Event()

    def __enter__(self) -> "FlushLog":
        self._spool = Spool.open(self._path)
        known = self._spool.recent_flushes(0)
        self._last = known[-1][0] if known else 0
        PACKAGE_LOG.handlers[:] = [self._handler]
        self._thread = threading.Thread(target=self._run, name="helena-flush-log", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            self._look()
        self._spool.close()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Print the flushes since the last look."""
        try:
            fresh = self._spool.recent_flushes(self._last)
        except SpoolError as error:
            # The next look finds them.
            if not self._troubled:
                log.warning("%s %s", error, error.remedy)
            self._troubled = True
            return
        self._troubled = False
        if fresh and fresh[0][0] > self._last + 1:
            missed = fresh[0][0] - self._last - 1
            log.warning("%s came too fast to be shown", render.many(missed, "flush", "flushes"))
        for number, flush in fresh:
            self._last = number
            self._print(self._line(flush))

    def _print(self, line: str) -> None:
        if not self._heard:
            return
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self._heard = False
            _silence_stdout()
            log.warning("nobody reads the flushes on stdout any more; Helena goes on without")
        except OSError as error:
            # What was written stays in the buffer, and comes with a later line.
            log.warning("a flush could not be written to stdout: %s", error.strerror)


def _silence_stdout() -> None:
    """Lead stdout nowhere: Python flushes it once more when it exits, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _flush_text(flush: FlushRecord) -> str:
    when = render.local_time(flush.at)
    if flush.error is not None:
        return f"{when} flush failed after {flush.seconds:.3f} s: {render.plain(flush.error)}"
    operations = render.many(flush.operations, "operation")
    return f"{when} flush: {operations}, {render.many(flush.rows, 'row')}, {flush.seconds:.3f} s"


def _flush_json(flush: FlushRecord) -> str:
    return json.dumps(
        {
            "time": render.instant(flush.at),
            "event": "flush",
            "operations": flush.operations,
            "rows": flush.rows,
            "seconds": round(flush.seconds, 6),
            "error": flush.error,
        }
    )


class _Handler(logging.Handler):
    """Writes to whatever stderr is now. A stderr that is gone or full stops nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        # Printed to None, a line would go to stdout.
        if sys.stderr is not None:
            with suppress(OSError):
                print(self.format(record), file=sys.stderr, flush=True)


class _TextFormatter(logging.Formatter):
    """One line: time, level, message; the traceback below it with -v."""

    def format(self, record: logging.LogRecord) -> str:
        message = render.plain(record.getMessage())
        line = f"{render.local_time(record.created)} {record.levelname.lower()}: {message}"
        if record.exc_info and PACKAGE_LOG.isEnabledFor(logging.DEBUG):
            return f"{line}\n{self.formatException(record.exc_info)}"
        return line


class _JsonFormatter(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": render.instant(record.created),
            "event": "log",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)
