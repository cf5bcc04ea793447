"""A file lock for one at a time, held for moments: writers of all processes queue up at it."""

import fcntl
import time

#: Seconds between two tries to get the lock, and before giving up: its holder may be stopped.
POLL = 0.0001
PATIENCE = 30.0


def wait_for_lock(fd: int) -> None:
    """Lock the file, but do not wait for ever. Raises BlockingIOError, and OSError."""
    deadline = 0.0
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline = deadline or time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)
        else:
            return
