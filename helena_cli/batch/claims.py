"""Files of a folder that are to be worked on once: claimed, then settled for good.

A claimed file is renamed into `processing/`; from there it goes to `done/` or, with the reason
beside it, to `failed/`. One process at a time works on a folder, behind a lock that ends with it;
what a killed one leaves in `processing/` is the first that the next one finds. Everything goes
through descriptors of the folders, so that no symbolic link put there leads elsewhere.
"""

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct

from helena_cli.errors import HelenaError

log = logging.getLogger(__name__)

PROCESSING = "processing"
DONE = "done"
FAILED = "failed"
REASON = ".reason.txt"

#: How long to wait for another process that works on the folder, and between two looks, seconds.
WAIT = 30.0
POLL = 0.05

#: A file is left alone until nobody has written to it for so many seconds: who makes it may still
#: be at it. One without content has probably just been made.
REST = 0.25
REST_EMPTY = 2.0

#: Bytes of a file's name that every usual file system takes.
_LONGEST_NAME = 255

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Unusable(Exception):
    """A claimed file cannot even be read; the text is the reason for a person."""


class Claimed(Struct, frozen=True):
    """A file that this process alone works on."""

    name: str
    #: Where it lay, or where a killed process left it: for messages.
    path: Path
    leftover: bool = False

    @property
    def label(self) -> str:
        """The name as text that any database takes: bytes that are not UTF-8 are escaped."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")


class Claims:
    """The files of one folder whose names match a pattern. A context manager.

    Inside it no other process claims from the folder. On leaving, what was claimed and not settled
    goes back. A folder that does not exist is empty, and stays absent. In a dry run nothing is
    locked, moved or made.
    """

    def __init__(
        self, folder: Path, pattern: str, *, dry_run: bool = False, wait: float = WAIT
    ) -> None:
        self.folder = folder
        self._pattern = pattern
        self._dry_run = dry_run
        self._wait = wait
        self._stack = ExitStack()
        self._fds: dict[str, int] = {}
        #: Claimed and not settled, by name.
        self._open: dict[str, Claimed] = {}
        #: What a file looked like when it was read.
        self._read: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "Claims":
        """Raises HelenaError when the folder cannot be used, or another process keeps it."""
        try:
            with self._translated():
                self._enter()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for claimed in list(self._open.values()):
            self.release(claimed)
        self._stack.close()
        self._fds.clear()

    def batches(self, size: int) -> Iterator[list[Claimed]]:
        """Claim the files that are there now, at most `size` at once, each batch by name.

        The next batch is claimed when it is asked for: settle this one before. What a killed
        process left comes first, in batches of its own; before the others a moment may pass, so
        that no half-written file is taken. Raises HelenaError.
        """
        for leftover in (True, False):
            with self._translated():
                names = self._names(PROCESSING if leftover else "")
                if not leftover and not self._dry_run:
                    self._let_rest(names)
            for start in range(0, len(names), size):
                with self._translated():
                    batch = [self._claim(name, leftover) for name in names[start : start + size]]
                if claimed := [one for one in batch if one is not None]:
                    yield claimed

    def count(self) -> int:
        """How many files there are now, claimed or not."""
        with self._translated():
            return len(self._names(PROCESSING)) + len(self._names(""))

    def read(self, claimed: Claimed, max_bytes: int) -> bytes:
        """All of its bytes. Raises Unusable; a link is not followed, and a pipe not opened."""
        source = self._fds[self._place(claimed)]
        try:
            before = os.lstat(claimed.name, dir_fd=source)
            _check(before, max_bytes)
            # It may have been exchanged since: no link, and no waiting for a pipe.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with open(os.open(claimed.name, flags, dir_fd=source), "rb") as file:
                status = os.fstat(file.fileno())
                _check(status, max_bytes)
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise Unusable(f"it cannot be read: {error.strerror}") from None
        if len(content) > max_bytes:
            raise Unusable(_too_large(max_bytes))
        self._read[claimed.name] = _looks(status)
        return content

    def written_ns(self, claimed: Claimed) -> int:
        """When what `read` returned was written: by its descriptor, as the path may be gone."""
        return self._read[claimed.name][-1]

    def done(self, claimed: Claimed) -> None:
        """Move it to `done/`, under a name of its own. Raises HelenaError."""
        self._settle(claimed, DONE)

    def failed(self, claimed: Claimed, reason: str) -> None:
        """Move it to `failed/` with `NAME.reason.txt` beside it. Raises HelenaError."""
        self._settle(claimed, FAILED, reason)

    def release(self, claimed: Claimed) -> None:
        """Put it back where it lay; when that cannot be, it stays for the next process to find."""
        self._open.pop(claimed.name, None)
        if self._dry_run:
            return
        source, target = self._fds[PROCESSING], self._fds[""]
        try:
            # Not a rename: meanwhile there may be a new file of this name.
            os.link(
                claimed.name,
                claimed.name,
                src_dir_fd=source,
                dst_dir_fd=target,
                follow_symlinks=False,
            )
            os.unlink(claimed.name, dir_fd=source)
        except FileNotFoundError:
            log.warning("%s is gone", claimed.path)
        except OSError as error:
            log.info("%s stays in %s/: %s", claimed.path, PROCESSING, error.strerror)

    def _enter(self) -> None:
        try:
            self._fds[""] = self._keep(os.open(self.folder, _FOLDER))
        except FileNotFoundError:
            return
        if self._dry_run:
            with suppress(FileNotFoundError):
                self._fds[PROCESSING] = self._keep(self._open_folder(PROCESSING))
            return
        if self._names("") or self._exists(PROCESSING, ""):
            self._subfolder(PROCESSING, mode=0o700)
            self._lock()

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _lock(self) -> None:
        """A file, not the folder itself: an NFS server locks only what is open for writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = self._keep(os.open(".lock", flags, 0o600, dir_fd=self._fds[PROCESSING]))
        deadline = time.monotonic() + self._wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HelenaError(
                        f"Another Helena process works on the files in {self.folder}.",
                        remedy="Wait until it is done, or end it, and run the command again.",
                    ) from None
                time.sleep(POLL)
            else:
                # A forked child may have a copy of the descriptor.
                self._stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
                return

    def _names(self, place: str) -> list[str]:
        """The names in the folder or in a subfolder that match, hidden ones and folders apart."""
        if place not in self._fds:
            return []
        with os.scandir(self._fds[place]) as listing:
            return sorted(
                (
                    entry.name
                    for entry in listing
                    if fnmatchcase(entry.name, self._pattern)
                    and not entry.name.startswith(".")
                    and not entry.is_dir(follow_symlinks=False)
                ),
                key=os.fsencode,
            )

    def _let_rest(self, names: list[str]) -> None:
        """Wait until the youngest of them is old enough."""
        now, wait = time.time(), 0.0
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(name, dir_fd=self._fds[""])
                if stat.S_ISREG(status.st_mode):
                    rest = REST if status.st_size else REST_EMPTY
                    # A clock that is wrong makes nobody wait longer.
                    wait = max(wait, min(rest, status.st_mtime + rest - now))
        time.sleep(wait)

    def _claim(self, name: str, leftover: bool) -> Claimed | None:
        """None when it has vanished, or when an unsettled one has this name."""
        if self._dry_run or leftover:
            place = self.folder / PROCESSING if leftover else self.folder
            return self._claimed(Claimed(name, place / name, leftover))
        source, target = self._fds[""], self._fds[PROCESSING]
        # Nobody else makes files there while the folder is locked.
        if self._exists(name, PROCESSING):
            return None
        try:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except FileNotFoundError:
            return None
        return self._claimed(Claimed(name, self.folder / name))

    def _claimed(self, claimed: Claimed) -> Claimed:
        if not self._dry_run:
            self._open[claimed.name] = claimed
        return claimed

    def _place(self, claimed: Claimed) -> str:
        return "" if self._dry_run and not claimed.leftover else PROCESSING

    def _settle(self, claimed: Claimed, place: str, reason: str | None = None) -> None:
        if self._dry_run:
            return
        with self._translated():
            try:
                status = os.lstat(claimed.name, dir_fd=self._fds[PROCESSING])
            except FileNotFoundError:
                self._open.pop(claimed.name, None)
                log.warning("%s is gone", claimed.path)
                return
            if self._read.pop(claimed.name, _looks(status)) != _looks(status):
                # Somebody still writes to it: what is in it now is another file.
                log.warning("%s was changed while it was worked on; it is put back", claimed.path)
                self.release(claimed)
                return
            folder = self._subfolder(place)
            name = self._free_name(claimed.name, place)
            if reason is not None:
                _write(name + REASON, reason, folder, status.st_mode)
            try:
                os.rename(claimed.name, name, src_dir_fd=self._fds[PROCESSING], dst_dir_fd=folder)
            except FileNotFoundError:
                # Somebody took it in this very moment: that must not stop the others.
                log.warning("%s is gone", claimed.path)
        self._open.pop(claimed.name, None)

    def _free_name(self, name: str, place: str) -> str:
        """The name itself, or with the time in it when there is one already."""
        stem, suffix = os.path.splitext(name)
        room = _LONGEST_NAME - len(REASON)
        added = ""
        while True:
            left = max(0, room - len(os.fsencode(added + suffix)))
            free = os.fsdecode(os.fsencode(stem)[:left]) + added + suffix
            if not self._exists(free, place):
                return free
            added = f".{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"

    def _exists(self, name: str, place: str) -> bool:
        try:
            os.lstat(name, dir_fd=self._fds[place])
        except FileNotFoundError:
            return False
        return True

    def _subfolder(self, name: str, mode: int = 0o777) -> int:
        if name not in self._fds:
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=self._fds[""])
            self._fds[name] = self._keep(self._open_folder(name))
        return self._fds[name]

    def _open_folder(self, name: str) -> int:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._fds[""])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise HelenaError(
                f"The files in {self.folder} cannot be worked on: {what}{error.strerror}.",
                remedy="Helena moves them into folders below it and must be allowed to; see "
                "[pending] for where it looks.",
            ) from error


def _check(status: os.stat_result, max_bytes: int) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise Unusable("it is a symbolic link, and those are not followed")
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("it is not a regular file")
    if status.st_size > max_bytes:
        raise Unusable(_too_large(max_bytes))


def _too_large(max_bytes: int) -> str:
    return f"it has more than {max_bytes:,} bytes"


def _looks(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _write(name: str, text: str, folder: int, mode: int) -> None:
    """Write a reason, for nobody who may not read the file itself: it may quote from it."""
    # Not into what is there: it would have the rights, or be the link, that somebody else gave it.
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    permissions = 0o600 | (mode & 0o066 if stat.S_ISREG(mode) else 0)
    fd = os.open(name, flags, permissions, dir_fd=folder)
    with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text.rstrip() + "\n")
