"""What does not succeed while folders are watched: tried again, and said once."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec import Struct

from helena_cli.documents.names import unescape
from helena_cli.documents.outbox import Failure
from helena_cli.errors import HelenaError

log = logging.getLogger(__name__)

#: A document that cannot be read is tried again after so many seconds, and reported after that.
RETRIES = (1.0, 5.0, 15.0)

#: Of documents that were indexed with a note, so many are named at once.
NAMED = 10


class Problems:
    """Why something did not succeed, by what it was; each said when it comes, and when it goes."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def note(self, what: str, error: HelenaError) -> None:
        """It did not succeed."""
        text = f"{error} {error.remedy}"
        if self._said.get(what) != text:
            log.warning("%s", text)
        self._said[what] = text

    def clear(self, what: str) -> None:
        """It succeeded."""
        if self._said.pop(what, None) is not None:
            log.warning("%s: that is over.", what)

    def first(self) -> str | None:
        """One of them, None when there is none."""
        return next(iter(self._said.values()), None)


class _Trouble(Struct):
    reason: str
    tries: int
    due: float | None


class Troubles:
    """Files and folders that could not be read. A file is retried, a folder is looked at anyway."""

    def __init__(self) -> None:
        self._known: dict[str, _Trouble] = {}

    def note(self, failures: Iterable[Failure], looked_at: Callable[[str], bool]) -> list[Failure]:
        """Take the failures of a look at what `looked_at` tells by its path.

        Returns those that have just been reported, for the first time.
        """
        now = time.monotonic()
        failed = {one.path: one for one in failures if not one.indexed}
        for path in [path for path in self._known if path not in failed and looked_at(path)]:
            if self._known.pop(path).due is None:
                log.warning("%s: that is over.", path)
        reported = []
        for path, failure in failed.items():
            trouble = self._known.setdefault(path, _Trouble("", 0, now))
            is_new = trouble.due is not None or trouble.reason != failure.reason
            trouble.reason = failure.reason
            trouble.tries += 1
            retry = trouble.tries <= len(RETRIES) and not os.path.isdir(unescape(path))
            trouble.due = now + RETRIES[trouble.tries - 1] if retry else None
            if not retry and is_new:
                log.warning("%s: %s", path, failure.reason)
                reported.append(failure)
        return reported

    def due(self, now: float) -> list[str]:
        """The files that are to be tried again now, as the system has their names."""
        paths = [
            path for path, one in self._known.items() if one.due is not None and one.due <= now
        ]
        for path in paths:
            # Until the look has an answer; it has one when it ends.
            self._known[path].due = now + RETRIES[-1]
        return [unescape(path) for path in paths]

    def forget(self, folder: Path) -> None:
        """What could not be read in this folder was in another one that stood there."""
        self._known = {
            path: one
            for path, one in self._known.items()
            if not Path(unescape(path)).is_relative_to(folder)
        }

    def next_due(self) -> float | None:
        """When the next file is to be tried again, None when there is none."""
        return min((one.due for one in self._known.values() if one.due is not None), default=None)

    def first(self) -> str | None:
        """One that was reported, None when there is none."""
        return next(
            (f"{path}: {one.reason}" for path, one in self._known.items() if one.due is None), None
        )


def say(failures: Iterable[Failure]) -> None:
    """Documents with a row all the same: what is wrong with them, one line each, but not many."""
    noted = [failure for failure in failures if failure.indexed]
    for failure in noted[:NAMED]:
        log.warning("%s was indexed, but: %s", failure.path, failure.reason)
    if len(noted) > NAMED:
        log.warning("%d more documents were indexed with a remark.", len(noted) - NAMED)
