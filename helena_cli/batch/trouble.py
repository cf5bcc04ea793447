"""What SQLite and the disk may say to a spool, as Helena's errors with a remedy."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helena_cli.batch.identity import Damaged
from helena_cli.errors import SpoolError, SpoolFull, SpoolUnavailable

#: With less room than this on its disk, in bytes, a failed write means that the disk is full.
ROOM = 1024 * 1024


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is not, or no longer, a database, or holds what nobody wrote."""
    if isinstance(error, Damaged):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # The only one of this class that does not come from SQLite: a text is not Unicode.
        return type(error) is sqlite3.OperationalError
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_full(error: sqlite3.Error) -> bool:
    """Whether there was no room on the disk."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the file system into Helena's."""
    try:
        yield
    except sqlite3.ProgrammingError:
        # A bug, and not the file's fault.
        raise
    except sqlite3.Error as error:
        raise _translate(error, getattr(error, "sqlite_errorcode", 0) & 0xFF, path) from error
    except BlockingIOError as error:
        raise no_answer(path, "another process does not let it go") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_CANTOPEN
        raise _translate(error, code, path) from error


def _translate(error: Exception, code: int, path: Path) -> SpoolError:
    # Some files must grow before SQLite writes into them; it does not say then what was in the way.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and room(path) < ROOM):
        return SpoolFull(
            f"The disk of the queue is full ({path}); the operation was not accepted.",
            remedy="Free some space, or move the state directory (HELENA_STATE_DIR).",
        )
    if code in (
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_IOERR,
    ):
        return SpoolUnavailable(
            f"The queue {path} cannot be used: {error}.",
            remedy="Helena needs a local directory that it may write to: set HELENA_STATE_DIR.",
        )
    return no_answer(path, str(error))


def no_answer(path: Path, reason: str) -> SpoolError:
    """Somebody else has the file, or SQLite says something that nobody expected."""
    return SpoolError(
        f"The queue {path} did not answer: {reason}.",
        remedy="Another process may hold it; try again, and look with: helena status.",
    )


def room(path: Path) -> int:
    """Bytes that are free on the disk of this file."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return ROOM
    return disk.f_bavail * disk.f_frsize
