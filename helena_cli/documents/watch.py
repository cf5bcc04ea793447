"""The watcher: what happens in some folders is brought into the queue, for months on end.

Events are hints. A path that something happened to waits until it has been left alone, then it is
looked at as `reconcile` does. Everything is looked at when the watches are armed, when events were
lost, when folders came or went, and from time to time. One thread does all of it.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from helena_cli.documents import watch_scope
from helena_cli.documents.known import Queue
from helena_cli.documents.memory import Connect, Memory
from helena_cli.documents.names import escape
from helena_cli.documents.watch_agenda import Agenda
from helena_cli.documents.watch_events import Inbox
from helena_cli.documents.watch_folder import Folder
from helena_cli.documents.watch_look import Looker
from helena_cli.documents.watch_scope import Scope
from helena_cli.documents.watch_state import WatchedRoot, WatchState
from helena_cli.errors import ConfigurationError, HelenaError, UsageError
from helena_cli.settings import Settings

log = logging.getLogger(__name__)

#: Seconds between two looks after the folders themselves; and the pause after a turn, so that what
#: comes at once is worked on at once.
TICK = 1.0
PAUSE = 0.05

#: Without a turn for so many seconds the watcher does not live.
SILENCE = 60.0

#: The first and the longest pause before the database is tried again, seconds.
FIRST_RETRY = 1.0
LAST_RETRY = 30.0

#: What could not be looked at is tried again after so many seconds.
RETRY = 5.0

#: At the end all is looked at once more, where that takes no longer than this. Seconds.
QUICK = 2.0

_DATABASE = "The database"


class _Job(Struct, frozen=True):
    places: tuple[Path, ...]
    settings: Settings


class _Stopped(Exception):
    """A long look ends because the watcher ends."""


class Watcher:
    """Watches folders until it is stopped. `host` is this machine's name.

    `connect` opens the database when it is needed: at first, at each rescan, and to mark what is
    missing. `before_load` runs before each rescan, in the watcher's thread.
    """

    def __init__(
        self,
        places: Sequence[Path],
        settings: Settings,
        *,
        host: str,
        queue: Queue,
        connect: Connect,
        before_load: Callable[[], None] = lambda: None,
    ) -> None:
        self._job = _Job(tuple(places), settings)
        self._next: _Job | None = None
        self._host = host
        self._before_load = before_load
        self._memory = Memory(queue, connect)
        self._looker = Looker(self._memory, stands=self._stands, progress=self._live)
        self._agenda = Agenda(settings.watch)
        self._inbox = Inbox()
        self._scope: Scope | None = None
        #: Whether an ignore file has changed.
        self._ignoring = False
        self._folders: list[Folder] = []
        #: When all of a folder was looked at, and how long all that took the last time.
        self._looked: dict[Path, float] = {}
        self._seconds = 0.0
        self._load_due = self._retry_due = 0.0
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._finishing = False
        self._deadline = 0.0
        self._turned = time.monotonic()
        self._state = WatchState()
        self._publish()
        #: After the end: what could not be brought into the queue any more, "" for nothing.
        self.unfinished = ""

    def start(self) -> None:
        """Begin to watch. Without the database it says so, and goes on when that is there.

        Raises ConfigurationError and UsageError for folders that cannot be watched at all.
        """
        self._attempt_load(first=True)
        self._thread = threading.Thread(target=self._run, name="helena-watch", daemon=True)
        self._thread.start()

    def reconfigure(self, places: Sequence[Path], settings: Settings) -> None:
        """Watch these folders, with these settings, from the next turn on.

        What is wrong with them is said in the log; then the old ones stay.
        """
        self._next = _Job(tuple(places), settings)
        self._load_due = 0.0
        self._inbox.wake()

    def stop(self, timeout: float) -> None:
        """Look at what has not settled yet, within so many seconds, and end."""
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        self._inbox.wake()
        if self._thread is not None:
            self._thread.join(timeout + TICK)
            if self._thread.is_alive():
                log.error("helena-watch did not stop: it still waits for a disk or the database")
                self.unfinished = "the last look at the documents did not come to an end"

    @property
    def places(self) -> list[Path]:
        """What it watches, or is going to."""
        pending = self._next
        return [*self._job.places, *(pending.places if pending is not None else ())]

    def state(self) -> WatchState:
        """What there is to say of it now."""
        return self._state

    def alive(self) -> bool:
        """Whether its loop has turned lately."""
        thread = self._thread
        silent = time.monotonic() - self._turned
        return thread is not None and thread.is_alive() and silent < SILENCE

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._guarded(self._turn)
            self._publish()
            self._stopping.wait(PAUSE)
            self._inbox.wait(self._pause())
        self._guarded(self._finish)
        for folder in self._folders:
            folder.stop()
        self._publish()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A failure of one turn must not end the thread: nobody else would look."""
        try:
            work()
        except _Stopped:
            log.debug("a look was ended before its time")
            self._want_all()
        except Exception:
            log.exception("A turn of the watcher failed; all is looked at again.")
            self._stopping.wait(TICK)
            self._want_all()

    def _turn(self) -> None:
        self._live()
        if time.monotonic() >= self._load_due:
            self._attempt_load()
        self._check_folders()
        self._collect()
        now = time.monotonic()
        self._look_at([*self._agenda.take_paths(now), *self._looker.troubles.due(now)])
        if self._looker.deferred and now >= self._retry_due:
            self._looker.retry()
            self._retry_due = time.monotonic() + RETRY
        wanted = self._agenda.folders(now)
        if wanted and self._ignoring:
            self._read_ignore_files()
        for folder in self._folders:
            if folder.path in wanted:
                self._look_at_all_of(folder, allow_missing=wanted[folder.path])

    def _live(self) -> None:
        """A sign of life; called again and again during long looks."""
        now = time.monotonic()
        if self._stopping.is_set() and (not self._finishing or now > self._deadline):
            raise _Stopped
        if now - self._turned > TICK:
            self._publish()
        self._turned = now

    def _attempt_load(self, *, first: bool = False) -> None:
        """Learn from the database what is known: at first, from time to time, and when asked."""
        job = self._next or self._job
        try:
            self._load(job)
        except HelenaError as error:
            unusable = isinstance(error, ConfigurationError | UsageError)
            if unusable and first:
                raise
            if unusable and self._next is not None:
                log.error("The old configuration stays in use. %s %s", error, error.remedy)
                self._next = None
            self._put_off(error)
            return
        self._looker.problems.clear(_DATABASE)
        self._attempts, self._next = 0, None
        rescan = job.settings.watch.rescan
        self._load_due = time.monotonic() + rescan * random.uniform(0.9, 1.1)

    def _put_off(self, error: HelenaError) -> None:
        self._looker.problems.note(_DATABASE, error)
        if not self._attempts:
            # A look does not wait for the database: what it finds can wait in the queue.
            self._want_all()
        pause = min(LAST_RETRY, FIRST_RETRY * 2**self._attempts)
        self._load_due = time.monotonic() + pause * random.uniform(0.75, 1.25)
        self._attempts += 1

    def _load(self, job: _Job) -> None:
        self._before_load()
        documents = job.settings.documents
        with self._memory.connected():
            registry = self._memory.registry()
            scope, targets = watch_scope.claim(job.places, documents, registry, self._host)
            self._memory.load(targets)
        self._looker.use(scope, documents)
        self._scope = scope
        paths = scope.folders()
        if job != self._job or paths != [folder.path for folder in self._folders]:
            for folder in self._folders:
                folder.stop()
            watch = job.settings.watch
            self._agenda = Agenda(watch)
            self._folders = [Folder(path, scope, watch, self._inbox, self._live) for path in paths]
            self._looked.clear()
            self._job = job
        else:
            for folder in self._folders:
                folder.renew(scope)
        self._want_all()

    def _check_folders(self) -> None:
        for folder in self._folders:
            if folder.check():
                self._armed(folder)

    def _armed(self, folder: Folder) -> None:
        if not folder.stood:
            # What was seen to go went with the folder that stood here before, or was hidden by a
            # mount: whether it is to be believed, the look at all of it decides.
            self._collect()
            self._agenda.forget(folder.path)
            self._looker.forget(folder.path)
        # If it stood all the time, only its observation did not: what is missing was deleted.
        self._agenda.want(folder.path, allow_missing=folder.stood)
        if self._scope is not None and not all(t.claimed for t in self._scope.below(folder.path)):
            # It was not there when namespaces were claimed.
            self._load_due = 0.0

    def _collect(self) -> None:
        """Take the events, and let settle what concerns documents."""
        now = time.monotonic()
        paths, lost = self._inbox.take()
        scope = self._scope
        if scope is None:
            return
        for path, is_folder in self._looker.with_links(paths).items():
            if scope.concerns(path, is_folder=is_folder):
                if not self._agenda.touched(path, now):
                    for folder in self._folders:
                        self._agenda.want(folder.path, allow_missing=True)
                stirred = is_folder
            else:
                stirred = scope.is_ignore_file(path)
                self._ignoring = self._ignoring or stirred
            if stirred:
                for folder in self._folders:
                    if Path(path).is_relative_to(folder.path):
                        self._agenda.stirred(folder.path, now)
        for observed in lost:
            log.warning("Events of %s were lost; all of it is looked at.", escape(str(observed)))
            self._agenda.lost(observed, now)

    def _read_ignore_files(self) -> None:
        """Let the events too obey what is ignored now."""
        self._ignoring = False
        if self._scope is None:
            return
        try:
            scope = self._scope.again()
        except ConfigurationError:
            # The look at the documents says what is wrong with it, and does nothing else.
            return
        self._scope = scope
        self._looker.use(scope, self._job.settings.documents)
        for folder in self._folders:
            folder.renew(scope)

    def _look_at(self, paths: Sequence[str]) -> None:
        """Look at paths in folders that stand; the others are looked at when they are back."""
        if not paths:
            return
        standing = tuple(str(folder.path) for folder in self._folders if folder.is_standing())
        inside = tuple(os.path.join(folder, "") for folder in standing)
        self._looker.paths(path for path in paths if path in standing or path.startswith(inside))

    def _look_at_all_of(self, folder: Folder, *, allow_missing: bool) -> None:
        started = time.monotonic()
        folder.verify()
        if not folder.is_standing():
            # It is looked at when it is back.
            self._agenda.done(folder.path)
            return
        allow_missing = allow_missing and folder.has_same_mounts()
        if self._looker.folder(folder.path, allow_missing=allow_missing):
            self._looked[folder.path] = time.time()
        self._agenda.done(folder.path)
        self._seconds = time.monotonic() - started

    def _stands(self, root: Path) -> bool:
        """Whether what is missing in a root is really gone."""
        return any(
            folder.is_standing()
            for folder in self._folders
            if root.is_relative_to(folder.path) or folder.path.is_relative_to(root)
        )

    def _want_all(self) -> None:
        for folder in self._folders:
            self._agenda.want(folder.path)

    def _finish(self) -> None:
        """Look at what has not settled, and at all once more where that is quick."""
        self._finishing = True
        self.unfinished = "the last look at the documents did not come to an end"
        # The end may have come while one was being armed: that is not looked at before it is.
        self._check_folders()
        wanted = self._agenda.folders(time.monotonic())
        self._collect()
        self._look_at(self._agenda.take_all_paths())
        self._looker.retry()
        for folder in self._folders:
            # Events on their way are not waited for.
            if folder.path in wanted or self._seconds < QUICK:
                self._look_at_all_of(folder, allow_missing=wanted.get(folder.path, False))
        self.unfinished = ""
        if self._scope is None:
            self.unfinished = "the folders were never looked at, for the database was away"
        elif self._looker.deferred:
            self.unfinished = self._looker.failure() or "some paths could not be looked at"

    def _pause(self) -> float:
        """How long there is nothing to do, at most until the next look after the folders."""
        now = time.monotonic()
        due = [at for at in (self._agenda.next_due(), self._load_due) if at is not None]
        return max(0.0, min([TICK, *(at - now for at in due)]))

    def _publish(self) -> None:
        roots = tuple(folder.state for folder in self._folders) or tuple(
            WatchedRoot(escape(str(place)), "away", "it waits for the database")
            for place in self._job.places
        )
        full = [self._looked.get(folder.path) for folder in self._folders]
        times = [at for at in full if at is not None]
        self._state = WatchState(
            roots=roots,
            settling=len(self._agenda),
            changes=tuple(self._memory.changes),
            last_full=min(times) if times and len(times) == len(full) else None,
            failure=self._looker.failure(),
        )
