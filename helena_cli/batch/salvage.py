"""What can still be read of a damaged spool, brought into a new one that takes its place.

The position rows in the database go by spool id and operation id. So both are kept where they can
be read. Without the old identity, or the nonces in the lanes, nobody can tell what was written
already, and the operations become dead letters.
"""

import os
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from helena_cli.batch import identity
from helena_cli.batch.operation import Kind

#: The SQLSTATE-like mark of an operation whose spool lost its identity.
DAMAGED = "HL003"

#: How many ranges are tried around damaged pages; a page's own rows are never found.
PROBES = 5_000

PAGE = 4096

LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

#: How long whoever closes the damaged file may take, in seconds.
PATIENCE = 30.0

_Text = str | None
_At = float | None

#: What a row must hold to be believed; a row of zeros is no operation.
ROWS: dict[str, Any] = {
    "counters": tuple[int, int, int, int, int, int, int, int, int, int, int],
    "lanes": tuple[int, str, int, int, int, int, int, int, str, _Text, _Text, _Text, _At, _At, int],
    "operations": tuple[int, int, Kind, bytes, int, float | None, float | None],
    "dead_letters": tuple[int, Kind, str, bytes, str | None, str, str | None, int, float],
    "flushes": tuple[float, int, int, float, str | None],
    "consumed": tuple[str, str, float],
    "histograms": tuple[str, float, int, float],
}

_check_data = msgspec.json.Decoder(dict[str, Raw]).decode


def rebuild(path: Path, now: float) -> str:
    """Put a new file at `path` with all that can be read, move the damaged one aside; a report.

    Nobody else may write meanwhile. The damaged file stays in its place until the new one is
    complete, so that a repair that was cut off begins again.
    """
    fresh = Path(f"{path}.new")
    fresh.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(sqlite3.connect(fresh, isolation_level=None)) as new:
        # Nobody needs it half done, and it is put on the disk at the end.
        new.execute("PRAGMA journal_mode = OFF").fetchall()
        new.execute("PRAGMA synchronous = OFF")
        new.execute("BEGIN")
        identity.create(new, identity.home(fresh, as_if_at=path))
        new.execute("COMMIT")
        # SQLite would delete the log of an empty file.
        if path.stat().st_size < PAGE or not _has_tables(path):
            _graft(path, fresh)
        new.execute("BEGIN")
        with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as old:
            report = _copy(old, new, path, now)
        new.execute("COMMIT")
        new.execute("PRAGMA journal_mode = WAL").fetchall()
    _sync(fresh)
    aside = _swap(path, fresh)
    return f"{report}; the damaged file is {aside}"


def _has_tables(path: Path) -> bool:
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection, damage_passed_over():
        # A file of an earlier version has no histograms, and is none the worse for it.
        for table in ROWS.keys() - {"histograms"}:
            connection.execute(f"EXPLAIN SELECT * FROM {table}").fetchall()
        return True
    return False


def _graft(path: Path, fresh: Path) -> None:
    """Give a file whose first page is beyond reading, or that was cut off, the one of a new spool.

    It says where the tables begin: in all spools at the same pages, for none is ever removed.
    """
    content = bytearray(fresh.read_bytes())
    pages = max(len(content), -(-path.stat().st_size // PAGE) * PAGE) // PAGE
    # The file has a log, and so many pages.
    content[18:20] = b"\2\2"
    content[28:32] = pages.to_bytes(4, "big")
    with path.open("r+b") as file:
        file.write(content[:PAGE])
        file.truncate(pages * PAGE)


def _swap(path: Path, fresh: Path) -> Path:
    aside = Path(f"{path}.damaged-{time.time_ns()}")
    try:
        # A second name first: nobody ever finds the path without a file.
        os.link(path, aside)
    except OSError:
        os.rename(path, aside)
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    os.rename(fresh, path)
    _sync(path.parent)
    return aside


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, path: Path, now: float) -> str:
    """Copy every row that can be read and believed, and make the books true again."""
    old.text_factory = lambda text: text.decode(errors="replace")
    # What the log holds belongs into the file that is kept, if that is possible at all.
    old.execute("PRAGMA busy_timeout = 0").fetchall()
    with suppress(sqlite3.DatabaseError):
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    old.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}").fetchall()
    counted = _copy_counters(old, new)
    lanes = _is_whole(old, "lanes")
    for table in ("lanes", "dead_letters", "flushes", "consumed", "histograms"):
        _insert(new, table, readable_rows(old, table))
    expected = _expected(new) if counted and lanes else None
    # The rows count themselves in; their ids come in no order.
    new.execute(
        "UPDATE counters SET last_id = max(last_id, (SELECT coalesce(max(last_id), 0) FROM lanes))"
    )
    new.execute("UPDATE lanes SET inserts = 0, updates = 0, messages = 0, bytes = 0, accepted = 0")
    _insert(new, "operations", readable_rows(old, "operations"))
    # Whoever is dead already was buried after this was written.
    new.execute("DELETE FROM operations WHERE id IN (SELECT id FROM dead_letters)")
    _bury_unknown(new, now, everything=not (lanes and _copy_identity(old, new, path)))
    return _settle(new, expected)


@contextmanager
def damage_passed_over() -> Iterator[None]:
    """Leave out what cannot be read. What is merely locked is not damaged."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in LOCKED:
            raise


def readable_rows(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """Rows from both ends up to the damage, and in between wherever a rowid can be reached."""
    ranges: deque[tuple[int, int]] = deque()
    with damage_passed_over():
        connection.execute(f"EXPLAIN SELECT * FROM {table}").fetchall()
        # Somebody knows where the table begins: else no range would do.
        ranges.append((-(2**63), 2**63 - 1))
    for _ in range(PROBES):
        if not ranges:
            return
        low, high = ranges.popleft()
        with damage_passed_over():
            for number, *row in _walk(connection, table, low, high, "ASC"):
                low = number
                yield tuple(row)
            continue
        with damage_passed_over():
            for number, *row in _walk(connection, table, low, high, "DESC"):
                high = number
                yield tuple(row)
            continue
        # Widest parts first.
        middle = (low + high) // 2
        halves = ((low, middle + 1), (middle, high))
        ranges.extend(half for half in halves if half != (low, high) and half[1] - half[0] > 1)


def _walk(
    connection: sqlite3.Connection, table: str, low: int, high: int, order: str
) -> Iterator[tuple[Any, ...]]:
    """The rows between two rowids. One by one: who reads ahead loses the last before the damage."""
    query = (
        f"SELECT rowid, * FROM {table} WHERE rowid > ? AND rowid < ? ORDER BY rowid {order} LIMIT 1"
    )
    while row := connection.execute(query, (low, high)).fetchone():
        if not low < row[0] < high:
            raise identity.Damaged("its rows are in no order")
        yield row
        low, high = (row[0], high) if order == "ASC" else (low, row[0])


def _insert(connection: sqlite3.Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    marks = ", ".join("?" * len(ROWS[table].__args__))
    connection.executemany(
        f"INSERT OR IGNORE INTO {table} VALUES ({marks})",
        (row for row in rows if _is_sound(table, row)),
    )


def _is_sound(table: str, row: tuple[Any, ...]) -> bool:
    try:
        msgspec.convert(row, ROWS[table], builtin_types=(bytes,))
        if table in ("operations", "dead_letters"):
            _check_data(row[3])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _is_whole(connection: sqlite3.Connection, table: str) -> bool:
    with damage_passed_over():
        return all(_is_sound(table, row) for row in connection.execute(f"SELECT * FROM {table}"))
    return False


def _copy_counters(old: sqlite3.Connection, new: sqlite3.Connection) -> bool:
    """False when they cannot be read."""
    rows = [row for row in readable_rows(old, "counters") if _is_sound("counters", row)]
    if len(rows) != 1:
        return False
    new.execute("DELETE FROM counters")
    _insert(new, "counters", rows)
    return True


def _expected(connection: sqlite3.Connection) -> int:
    """How many operations and dead letters there must have been."""
    query = (
        "SELECT accepted + (SELECT coalesce(sum(accepted), 0) FROM lanes)"
        " - written - coalesced - dropped FROM counters"
    )
    return int(connection.execute(query).fetchone()[0])


def _copy_identity(old: sqlite3.Connection, new: sqlite3.Connection, path: Path) -> bool:
    """Take over the spool's id and target; False when it has none, or came from elsewhere."""
    known = {}
    for key in ("spool_id", "target_id", "home"):
        with damage_passed_over():
            for (value,) in old.execute("SELECT value FROM meta WHERE key = ?", (key,)):
                known[key] = value
    if known.pop("home", None) != identity.home(path) or not known.get("spool_id"):
        return False
    new.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", known.items())
    return True


def _bury_unknown(connection: sqlite3.Connection, now: float, *, everything: bool) -> None:
    """Make dead letters of the operations of which nobody knows whether they were written."""
    if everything:
        connection.execute("UPDATE lanes SET nonces = ''")
    connection.execute(
        "INSERT INTO dead_letters SELECT o.id, o.kind, coalesce(l.name, 'unknown'), o.data, ?,"
        " 'not written: the spool was damaged and lost its identity; it may have been written',"
        " NULL, o.attempts, ? FROM operations o LEFT JOIN lanes l ON l.id = o.lane"
        " WHERE ? OR l.id IS NULL",
        (DAMAGED, now, everything),
    )
    connection.execute("DELETE FROM operations WHERE id IN (SELECT id FROM dead_letters)")


def _settle(connection: sqlite3.Connection, expected: int | None) -> str:
    """Make the counters of the law true again, and say what became of everything."""
    (kept,) = connection.execute("SELECT count(*) FROM operations").fetchone()
    (dead,) = connection.execute("SELECT count(*) FROM dead_letters").fetchone()
    lost = 0 if expected is None else max(0, expected - kept - dead)
    connection.execute("UPDATE lanes SET accepted = 0")
    connection.execute(
        "UPDATE counters SET lost = lost + ?, accepted = written + coalesced + dropped + ?,"
        " last_id = max(last_id, coalesce((SELECT max(id) FROM operations), 0),"
        " coalesce((SELECT max(id) FROM dead_letters), 0))",
        (lost, kept + dead),
    )
    missing = "nobody can tell how many" if expected is None else str(lost)
    return f"{kept} operations and {dead} dead letters were salvaged, {missing} are lost"
