"""File system events of a folder, as paths: hints that something happened there, no more."""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

log = logging.getLogger(__name__)

# What it says of lost events is said here, and would go to stderr past the format of the log.
logging.getLogger("watchdog").addHandler(logging.NullHandler())

#: Opened and closed unchanged are left out, for Helena reads documents herself and would never come
#: to rest; so are changes of a folder's own times, which say nothing that the others do not.
EVENTS: list[type[FileSystemEvent]] = [
    *(FileCreatedEvent, FileModifiedEvent, FileClosedEvent, FileAttribEvent),
    *(FileMovedEvent, FileDeletedEvent, DirCreatedEvent, DirMovedEvent, DirDeletedEvent),
]

#: More paths than this are not kept: everything is looked at instead.
LIMIT = 100_000

#: How long a thread may take to stop, seconds.
PATIENCE = 5.0


class Inbox:
    """Paths that something happened to, and folders whose events were lost. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._paths: dict[str, bool] = {}
        self._lost: set[Path] = set()

    def put(self, path: str, *, is_folder: bool, observed: Path) -> None:
        """Take a path; the folder that is observed is noted instead when there are too many."""
        with self._lock:
            if len(self._paths) >= LIMIT:
                self._lost.add(observed)
            else:
                self._paths[path] = is_folder or self._paths.get(path, False)
        self._wake.set()

    def lose(self, observed: Path) -> None:
        """Events of this folder were lost."""
        with self._lock:
            self._lost.add(observed)
        self._wake.set()

    def take(self) -> tuple[dict[str, bool], set[Path]]:
        """All paths, each with whether it is a folder, and the folders with lost events."""
        with self._lock:
            self._wake.clear()
            paths, self._paths = self._paths, {}
            lost, self._lost = self._lost, set()
        return paths, lost

    def wake(self) -> None:
        """End a `wait`."""
        self._wake.set()

    def wait(self, seconds: float) -> None:
        """Wait until there is something, or for so long."""
        self._wake.wait(seconds)


class Observation(Protocol):
    """A folder and all below it, observed: `start` it once, then `stop` it."""

    #: Why it does not see everything any more, "" while it does.
    flaw: str

    def start(self, progress: Callable[[], None]) -> None:
        """Arm it, with a call for each folder; from now on the inbox is told. Raises OSError."""

    def stop(self) -> None:
        """End its threads; one that does not end is named in the log."""

    def is_alive(self) -> bool:
        """Whether all of its threads run: one that has died says nothing."""


class NativeObservation:
    """The events of whatever system this is, as watchdog has them."""

    def __init__(self, folder: Path, inbox: Inbox, keep: Callable[[str], bool]) -> None:
        self._folder = folder
        self._inbox = inbox
        self._observer = Observer()
        self.flaw = ""

    def start(self, progress: Callable[[], None]) -> None:
        """Arm it, which takes the system itself but a moment. Raises OSError."""
        handler = _Handler(self._folder, self._inbox)
        self._observer.schedule(handler, str(self._folder), recursive=True, event_filter=EVENTS)
        self._observer.start()

    def stop(self) -> None:
        """End its threads."""
        try:
            self._observer.stop()
        except Exception:
            # Whatever broke it, the folder has to be observed anew, or left in peace.
            log.debug("the observation of %s broke at its end", self._folder, exc_info=True)
        with suppress(RuntimeError):
            self._observer.join(PATIENCE)
        if self._observer.is_alive():
            log.error("%s, which observed %s, did not stop", self._observer.name, self._folder)

    def is_alive(self) -> bool:
        """Whether its threads run; that of a folder that was deleted does not."""
        emitters = self._observer.emitters
        return (
            self._observer.is_alive()
            and bool(emitters)
            and all(emitter.is_alive() for emitter in emitters)
        )


class _Handler(FileSystemEventHandler):
    """Only notes paths: if it failed or waited, no event would come any more."""

    def __init__(self, folder: Path, inbox: Inbox) -> None:
        self._folder = folder
        self._inbox = inbox

    def dispatch(self, event: FileSystemEvent) -> None:
        for path in (event.src_path, event.dest_path):
            if path:
                text = os.fsdecode(path)
                self._inbox.put(text, is_folder=event.is_directory, observed=self._folder)
