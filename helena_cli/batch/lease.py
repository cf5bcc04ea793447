"""A lock between processes that ends with its holder, however that ends."""

import fcntl
import os
import time
import weakref
from pathlib import Path

from helena_cli.batch.trouble import translated

#: Seconds between two looks at a lock that somebody else holds.
POLL = 0.05


class Lease:
    """An exclusive lock on a file beside the spool. Not reentrant; one object per use."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._fd: int | None = None
        _leases.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._fd is not None

    def acquire(self, timeout: float = 0.0) -> bool:
        """Take the lock if it is free or becomes so within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._fd is None:
            self._fd = self._try(fcntl.LOCK_EX)
            if self._fd is None:
                if time.monotonic() >= deadline and self.held_by_anyone():
                    return False
                # Who merely looks whether it is held is gone in a moment.
                time.sleep(POLL)
        return True

    def release(self) -> None:
        """Give it back; nothing happens when it is not held."""
        if self._fd is not None:
            # A child that was forked without Python's knowledge may have a copy of the descriptor.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close a forked child's copy: the lock itself stays with the parent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def held_by_anyone(self) -> bool:
        """Whether some process holds it now."""
        if self.held:
            return True
        # A shared lock, so that two who look at once do not see each other.
        fd = self._try(fcntl.LOCK_SH)
        if fd is None:
            return True
        os.close(fd)
        return False

    def _try(self, mode: int) -> int | None:
        """The locked file's descriptor; None when somebody else has it."""
        with translated(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                # A descriptor that nobody knows of would keep the lock.
                os.close(fd)
                raise
        return fd


_leases: "weakref.WeakSet[Lease]" = weakref.WeakSet()


def _forget_in_child() -> None:
    for lease in list(_leases):
        lease.forget()


os.register_at_fork(after_in_child=_forget_in_child)
