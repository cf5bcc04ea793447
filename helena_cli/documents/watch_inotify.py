"""Events of a folder on Linux: a watch of inotify on each folder in it that may hold documents.

watchdog reads the kernel's events. Its observers are not used here: they watch ignored trees too,
pass over folders that the kernel refuses to watch, and end with a KeyError when folders are moved
about. What a folder is called is kept here instead. Where that may have gone wrong for a moment a
look makes up for it: each new folder is watched first, and looked at after that.
"""

import errno
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)

from helena_cli.documents.watch_events import PATIENCE, Inbox

log = logging.getLogger(__name__)

#: Opening and reading are left out: Helena reads documents herself, and would never come to rest.
_MASK = Mask(
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_MODIFY
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_MOVED_FROM
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_DONT_FOLLOW
    | InotifyConstants.IN_EXCL_UNLINK
)

#: The kernel has no more watches, or no more memory for them.
_REFUSALS = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EMFILE})


class InotifyObservation:
    """A folder and all below it that `keep` wants, observed. To be used once.

    The methods that begin with `on_` are for the thread that reads the events.
    """

    def __init__(self, folder: Path, inbox: Inbox, keep: Callable[[str], bool]) -> None:
        self._folder = folder
        self._inbox = inbox
        self._keep = keep
        self._id = CallbackId(id(self))
        self._lock = threading.Lock()
        self._names: dict[WatchDescriptor, str] = {}
        self._watches: dict[str, WatchDescriptor] = {}
        self._source: InotifyFD | None = None
        #: Why it does not see everything any more, "" while it does.
        self.flaw = ""

    def start(self, progress: Callable[[], None]) -> None:
        """Arm the watches, with a call for each. Raises OSError when one of them is refused."""
        # Of a folder that was moved while it was being armed: here the last name counts.
        warnings.filterwarnings("ignore", "Callback with id .* already exists", RuntimeWarning)
        self._source = InotifyFD()
        # Started before all else, for only its thread can close it.
        self._source.start()
        try:
            with self._lock:
                self._watch(str(self._folder), progress)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the thread that reads the events."""
        source = self._source
        if source is None:
            return
        with suppress(OSError):
            source.stop()
        source.join(PATIENCE)
        if source.is_alive():
            log.error("%s, which observed %s, did not stop", source.name, self._folder)

    def is_alive(self) -> bool:
        """Whether events are read, and the folder has not been deleted."""
        source = self._source
        return source is not None and source.is_alive() and str(self._folder) in self._watches

    def on_event(self, event: InotifyEvent) -> None:
        """Something happened in a watched folder, or to it."""
        with self._lock:
            parent = self._names.get(event.wd)
            if parent is None:
                return
            path = os.path.join(parent, os.fsdecode(event.name)) if event.name else parent
            if event.name and event.is_directory:
                self._follow(event, path)
        self._inbox.put(path, is_folder=event.is_directory, observed=self._folder)

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """A watched folder is gone, or its file system."""
        with self._lock:
            self._forget(wd)

    def on_queue_overflow(self) -> None:
        """The kernel has thrown events away: folders may have come and gone among them."""
        self.flaw = "events were lost"
        self._inbox.lose(self._folder)

    def _follow(self, event: InotifyEvent, path: str) -> None:
        """Keep the watches in step with a folder that came, went or may be read now."""
        if event.is_moved_from:
            # Wherever it went, it is not called so any more; if it is still here, it comes back.
            inside = f"{path}/"
            gone = [name for name in self._watches if name == path or name.startswith(inside)]
            for name in gone:
                self._unwatch(name)
        elif event.is_create or event.is_moved_to or event.is_attrib:
            try:
                self._watch(path)
            except OSError as error:
                self.flaw = f"a new folder cannot be watched: {error}"

    def _watch(self, path: str, progress: Callable[[], None] = lambda: None) -> None:
        """Watch a folder and all below it. Raises OSError when that is refused."""
        pending = [path]
        while pending:
            folder = pending.pop()
            progress()
            if folder in self._watches or not os.access(folder, os.R_OK):
                continue
            try:
                self._add(folder)
                with os.scandir(folder) as entries:
                    below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError as error:
                if error.errno in _REFUSALS or folder == str(self._folder):
                    raise
                # It has gone meanwhile.
                continue
            pending.extend(filter(self._keep, below))

    def _add(self, folder: str) -> None:
        if self._source is None:
            return
        wd = self._source.add_callback(os.fsencode(folder), _MASK, self, self._id)
        # A folder that was moved in while nobody looked has its watch, but another name.
        self._forget(wd)
        self._names[wd] = folder
        self._watches[folder] = wd

    def _unwatch(self, folder: str) -> None:
        wd = self._watches[folder]
        self._forget(wd)
        if self._source is not None:
            with suppress(OSError):
                self._source.remove_callbacks([(wd, self._id)])

    def _forget(self, wd: WatchDescriptor) -> None:
        name = self._names.pop(wd, None)
        if name is not None and self._watches.get(name) == wd:
            del self._watches[name]
