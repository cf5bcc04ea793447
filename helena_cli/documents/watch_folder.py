"""One watched folder: observed by events, or polled, or away for the moment.

A folder that is not there is left alone: what is missing in it is not marked. When it is there
again, or another one in its place, everything in it has to be looked at.
"""

import errno
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
from msgspec import Struct

from helena_cli.batch.disk import file_system, is_network
from helena_cli.documents import scan
from helena_cli.documents.names import escape, unescape
from helena_cli.documents.scan import Unreadable
from helena_cli.documents.watch_events import Inbox, NativeObservation, Observation
from helena_cli.documents.watch_scope import Scope
from helena_cli.documents.watch_state import WatchedRoot
from helena_cli.settings import WatchSettings

log = logging.getLogger(__name__)

#: Local mounts of what others change: inotify sees only what this machine does to them.
_SHARED = frozenset(
    {"9p", "drvfs", "vboxsf", "virtiofs", "prl_fs", "vmhgfs", "fuse.vmhgfs-fuse", "fuse.rclone"}
)

_RAISE = "raise fs.inotify.max_user_watches"
_REMEDIES = {errno.ENOSPC: _RAISE, errno.EMFILE: "raise fs.inotify.max_user_instances"}
_MAX_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")

#: An observation that ends by itself so often, and each time so soon (seconds), is given up.
_DEATHS = 3
_SOON = 60.0

Facts = tuple[int, int, int]


class Identity(Struct, frozen=True):
    """Which folder this is: what is mounted over it has another one."""

    device: int
    inode: int
    #: File systems that are mounted below it, where documents may be.
    mounts: frozenset[str]


class Folder:
    """A folder and how it is watched. `check` it every second or so.

    `progress` is called again and again meanwhile, for a large tree takes long; it may end that.
    """

    def __init__(
        self,
        path: Path,
        scope: Scope,
        settings: WatchSettings,
        inbox: Inbox,
        progress: Callable[[], None],
    ) -> None:
        self.path = path
        self._scope = scope
        self._settings = settings
        self._inbox = inbox
        self._progress = progress
        self._mode: Literal["events", "polling", "away"] = "away"
        self._reason = "it has not been looked at yet"
        self._identity: Identity | None = None
        self._observation: Observation | None = None
        self._seen: dict[str, Facts] = {}
        self._due = 0.0
        self._left = self._stale = False
        #: Whether it is the same folder that was watched before it was armed the last time.
        self.stood = False
        self._deaths = 0
        self._armed = 0.0
        #: The reason for polling that was said.
        self._said = ""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def state(self) -> WatchedRoot:
        """What to tell of it."""
        reason = "" if self._mode == "events" else self._reason
        return WatchedRoot(escape(str(self.path)), self._mode, reason)

    def check(self) -> bool:
        """See to it that the folder is watched; whether all in it has to be looked at now."""
        place = _place(self.path)
        if place is None:
            self._leave("it is not there, or may not be entered; its documents stay as they are")
            return False
        if self._mode == "away" or not self.has_same_mounts() or self._is_dead():
            return self._arm()
        if self._mode == "polling" and time.monotonic() >= self._due:
            self._poll()
        return False

    def is_standing(self) -> bool:
        """Whether it is the folder that has been watched: what is missing in it is gone."""
        place = _place(self.path)
        alive = self._observation is None or self._observation.is_alive()
        return self._mode != "away" and place is not None and self._is(place) and alive

    def has_same_mounts(self) -> bool:
        """Whether nothing was mounted or unmounted below it either, which no event tells."""
        return self._identity is not None and self._identify() == self._identity

    def renew(self, scope: Scope) -> None:
        """Watch this scope from the next `verify` on; who was polled may be observed then."""
        self._scope = scope
        self._stale = True

    def verify(self) -> None:
        """Make sure, before all is looked at, that nothing of it goes unseen after that."""
        if self._stale or (self._observation is not None and self._observation.flaw):
            self._rearm("")

    def stop(self) -> None:
        """End the observation."""
        if self._observation is not None:
            self._observation.stop()
            self._observation = None

    def _identify(self) -> Identity | None:
        place = _place(self.path)
        if place is None:
            return None
        inside = os.path.join(self.path, "")
        mounts = (part.mountpoint for part in psutil.disk_partitions(all=True))
        below = (mount for mount in mounts if mount.startswith(inside) and self._keeps(mount))
        return Identity(*place, frozenset(below))

    def _is(self, place: tuple[int, int]) -> bool:
        known = self._identity
        return known is not None and place == (known.device, known.inode)

    def _is_dead(self) -> bool:
        if self._observation is None or self._observation.is_alive():
            return False
        log.warning("The observation of %s has ended by itself; it is started again.", self)
        soon = time.monotonic() - self._armed < _SOON
        self._deaths = self._deaths + 1 if soon else 1
        return True

    def _leave(self, reason: str) -> None:
        if self._mode != "away" or self._reason != reason:
            log.warning("%s is not watched: %s.", self, reason)
        self.stop()
        self._mode, self._reason, self._identity, self._left = "away", reason, None, True

    def _arm(self) -> bool:
        """Begin anew; whether that succeeded."""
        self.stop()
        identity = self._identify()
        if identity is None:
            self._identity = None
            return False
        self._rearm("its observation keeps ending by itself" if self._deaths >= _DEATHS else "")
        # Not before: should that fail, it is still another folder the next time.
        self.stood, self._identity = identity == self._identity, identity
        if self._left:
            log.warning("%s is watched again.", self)
        self._left = False
        return True

    def _rearm(self, reason: str) -> None:
        self.stop()
        # Should this fail, it is begun anew.
        self._mode, self._reason = "away", "it is not observed yet"
        self._stale = False
        self._armed = time.monotonic()
        reason = reason or self._reason_to_poll() or self._observe()
        if reason:
            self._deaths = 0
            self._begin_polling(reason)

    def _observe(self) -> str:
        """Start to observe; "" or the reason why that is not possible."""
        try:
            observation = _observe(self.path, self._inbox, self._keeps, self._progress)
        except (OSError, RuntimeError) as error:
            return f"its events cannot be had: {_cause(error)}"
        self._observation = observation
        self._mode, self._reason, self._said = "events", "", ""
        return ""

    def _keeps(self, path: str) -> bool:
        return self._scope.concerns(path, is_folder=True)

    def _reason_to_poll(self) -> str:
        if self._settings.polling != "auto":
            return '[watch] polling is "always"' if self._settings.polling == "always" else ""
        kind = file_system(self.path)
        if is_network(kind) or kind.lower() in _SHARED:
            return f"it lies on a file system that does not tell what others change ({kind})"
        limit = max_watches()
        if limit is not None:
            count = 0
            for _ in _folders(str(self.path), self._keeps):
                self._progress()
                count += 1
            if count > limit:
                return f"it has {count:,} folders, and inotify watches {limit:,}: {_RAISE}"
        return ""

    def _begin_polling(self, reason: str) -> None:
        every = self._settings.polling_interval
        if self._settings.polling == "never":
            every = math.inf
        if self._said != reason:
            when = f"every {every:g} s" if every < math.inf else "at each rescan only"
            log.warning("%s is looked at %s: %s.", self, when, reason)
        self._said = reason
        self._mode, self._reason = "polling", reason
        self._seen = self._look({}) or {}
        self._due = time.monotonic() + every

    def _poll(self) -> None:
        """Tell what differs from the last look."""
        seen = self._look(self._seen)
        if seen is not None:
            for path, _ in seen.items() ^ self._seen.items():
                self._inbox.put(path, is_folder=False, observed=self.path)
            self._seen = seen
        self._due = time.monotonic() + self._settings.polling_interval

    def _look(self, before: dict[str, Facts]) -> dict[str, Facts] | None:
        """Path → size and times of each document; None when they cannot be had."""
        seen: dict[str, Facts] = {}
        for target in self._scope.below(self.path):
            documents = self._scope.filter_of(target)
            for part in target.within:
                for found in scan.walk(
                    target.folder,
                    part,
                    documents=documents,
                    others=target.others,
                    entering=lambda _: self._progress(),
                ):
                    if isinstance(found, Unreadable):
                        # Nobody knows what is in it.
                        return {**before, **seen}
                    path = os.path.join(target.folder, unescape(found.path))
                    seen[path] = found.size, found.modified_ns, found.changed_ns
        if before and not seen and _is_empty(self.path):
            self._leave("it is empty, like a folder that is not mounted")
            return None
        return seen


def max_watches() -> int | None:
    """How many folders inotify watches for this user; None where there is no such limit."""
    try:
        return int(_MAX_WATCHES.read_text())
    except (OSError, ValueError):
        return None


def _observe(
    path: Path, inbox: Inbox, keep: Callable[[str], bool], progress: Callable[[], None]
) -> Observation:
    """A started observation of this system's kind. Raises OSError, RuntimeError."""
    observation: Observation
    if sys.platform == "linux":
        from helena_cli.documents.watch_inotify import InotifyObservation

        observation = InotifyObservation(path, inbox, keep)
    else:
        observation = NativeObservation(path, inbox, keep)
    observation.start(progress)
    return observation


def _cause(error: Exception) -> str:
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0)
    return f"{error} ({remedy})" if remedy else str(error)


def _folders(path: str, keep: Callable[[str], bool]) -> Iterator[str]:
    """A folder and all below it that may hold documents."""
    pending = [path]
    while pending:
        yield (folder := pending.pop())
        with suppress(OSError), os.scandir(folder) as entries:
            pending.extend(
                entry.path
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and keep(entry.path)
            )


def _place(path: Path) -> tuple[int, int] | None:
    """Which folder is there; None when there is none, or when it may not be listed."""
    try:
        facts = os.stat(path)
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _is_empty(path: Path) -> bool:
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except OSError:
        return True
