"""Signals of a program that runs until it is told to end.

SIGTERM and SIGINT ask for an orderly end, and the second one ends the program at once. SIGHUP asks
to read the configuration again; when it comes because the terminal has gone, it asks for the end.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

_END = (signal.SIGTERM, signal.SIGINT)
_ALL = (*_END, signal.SIGHUP)


class Signals:
    """Notes what has been asked for while the block runs. For the main thread alone."""

    def __init__(self) -> None:
        #: Whether the end was asked for.
        self.stopping = False
        self._reload = False
        self._terminal = _has_terminal()
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] = (-1, -1)

    def __enter__(self) -> "Signals":
        # A handler may come between any two steps, so it takes no lock: it writes to a pipe.
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        for number in _ALL:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for end in self._pipe:
            os.close(end)

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes, or for so long."""
        if select.select([self._pipe[0]], [], [], max(0.0, seconds))[0]:
            with suppress(BlockingIOError):
                os.read(self._pipe[0], 1024)

    def take_reload(self) -> bool:
        """Whether the configuration is to be read again; asked for once."""
        asked, self._reload = self._reload, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _END or (self._terminal and not _has_terminal()):
            self.stopping = True
            for end in _END:
                # Whoever asks twice does not want to wait.
                signal.signal(end, signal.SIG_DFL)
        else:
            self._reload = True
        with suppress(BlockingIOError):
            os.write(self._pipe[1], b"!")


def _has_terminal() -> bool:
    return any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
