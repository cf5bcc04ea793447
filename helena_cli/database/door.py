"""What is remembered, from one process to the next, of a database that lets nobody in.

A login that hangs keeps its slot on the server until the lock ends that it waits for, also when the
program that knocked has gone. Whoever comes again and again must not knock each time: that would
use up the server's connections, the last ones for superusers too.
"""

import time
from contextlib import suppress
from pathlib import Path

#: The longest pause between two knocks, seconds.
LONGEST = 600.0


class Door:
    """A file: while it is there, somebody knocked and was not let in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def barred(self) -> bool:
        """Whether the last one who knocked was not let in."""
        return self._path.exists()

    def pause(self) -> float:
        """Seconds for which nobody should knock who comes again and again.

        That is as long as nobody was let in so far, but not for ever; 0 while another database of
        the server tells who holds the door.
        """
        try:
            first, last = float(self._path.read_text()), self._path.stat().st_mtime
        except (OSError, ValueError):
            return 0.0
        since = time.time() - last
        # The clock may have been set back.
        return 0.0 if since < 0 else max(0.0, min(LONGEST, last - first) - since)

    # A state directory that cannot be written to is no reason to say nothing.

    def held(self) -> None:
        """Somebody is known to hold it."""
        with suppress(OSError):
            self._path.touch(mode=0o600)
            self._path.write_text("")

    def silent(self) -> None:
        """Nobody answered, here or from another database."""
        with suppress(OSError):
            self._path.touch(mode=0o600)
            self._path.write_text(self._path.read_text() or str(time.time()))

    def opened(self) -> None:
        """Somebody was let in, or sent away."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
