"""Who watches a folder: for one queue, no folder is watched by two processes at once."""

import json
import os
import time
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from helena_cli.batch.lease import Lease
from helena_cli.batch.trouble import translated
from helena_cli.documents.names import escape
from helena_cli.errors import HelenaError


class WatchLocks:
    """The folders that this process watches. They end with it, however that ends."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._held: dict[Path, Lease] = {}

    def take(self, folders: list[Path]) -> None:
        """Take these folders besides those held, all or none.

        Raises HelenaError when another process watches one of them, or one around or below it.
        """
        taken = []
        try:
            for folder in folders:
                if folder not in self._held:
                    self._take(folder)
                    taken.append(folder)
        except HelenaError:
            self._release(taken)
            raise

    def keep(self, folders: list[Path]) -> None:
        """Give all others back."""
        self._release([folder for folder in self._held if folder not in folders])

    def release(self) -> None:
        """Give all of them back."""
        self._release(list(self._held))

    def _take(self, folder: Path) -> None:
        lease = Lease(self._path(folder))
        free = lease.acquire()
        if not free:
            raise _refusal(folder, *_read(lease.path))
        self._held[folder] = lease
        text = json.dumps({"pid": os.getpid(), "folder": str(folder), "since": time.time()})
        with translated(lease.path):
            lease.path.write_text(text, encoding="utf-8", errors="surrogatepass")
        for path in self._spool.parent.glob(f"{self._spool.stem}.watch-*"):
            pid, other, since = _read(path)
            if Path(other) in self._held or not _overlap(folder, Path(other)):
                continue
            if Lease(path).held_by_anyone():
                self._release([folder])
                raise _refusal(folder, pid, other, since)

    def _release(self, folders: list[Path]) -> None:
        for folder in folders:
            self._held.pop(folder).release()

    def _path(self, folder: Path) -> Path:
        digest = sha256(os.fsencode(folder)).hexdigest()[:12]
        return self._spool.with_suffix(f".watch-{digest}")


def _read(path: Path) -> tuple[int, str, float]:
    """Which process watches which folder since when; zeros where that cannot be read yet."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = path.read_text(encoding="utf-8", errors="surrogatepass")
        known = json.loads(text)
        return int(known["pid"]), str(known["folder"]), float(known["since"])
    return 0, "", 0.0


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _refusal(folder: Path, pid: int, other: str, since: float) -> HelenaError:
    what = "" if other in ("", str(folder)) else f" with {escape(other)}"
    when = f"{datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}"
    who = f"process {pid}, since {when}" if pid else "another process"
    return HelenaError(
        f"{escape(str(folder))} is watched already{what}, by {who}.",
        remedy=f"Let that one go on, or end it first: kill {pid or 'PID'}, or helena service "
        "uninstall when it is the background service.",
    )
