"""The SQL backlog: files with statements that programs left behind, each applied exactly once.

Many files go into one transaction, each behind a savepoint; the transaction also records them, by
name and content, in `helena.applied_files`. Whatever happens to the process, the line or the
answer to COMMIT, the record tells what was applied. Nothing that is read here is trusted: see
`allowlist`.
"""

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, Unpack

import psycopg
from msgspec import Struct
from msgspec.structs import replace

from helena_cli.batch.claims import Claimed, Claims, Unusable
from helena_cli.database import allowlist, schema
from helena_cli.database.allowlist import NotAllowed, TableName
from helena_cli.database.applying import Applying, File, Interrupted, Verdict
from helena_cli.database.connection import Connection, translate
from helena_cli.database.script import Statement, Unfinished, statements

log = logging.getLogger(__name__)

PATTERN = "*.sql"

#: Files to a transaction.
FILES = 100

#: How often a file is tried that is in somebody's way, and how long to wait between, seconds.
ATTEMPTS = 3
PAUSE = 0.2

ANYTHING = "helena process-pending --allow-any-sql applies files without such a look at them."

_VISIBLE = """\
SELECT n.nspname, c.relname, pg_table_is_visible(c.oid)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = ANY(%s)"""

#: Files so far, how many there are, and the name of the last one.
Progress = Callable[[int, int | None, str], None]


class Options(TypedDict, total=False):
    """How `drain_backlog` may be varied."""

    #: Apply whatever a file says, except what would end or change the transaction.
    allow_any_sql: bool
    #: Look and report, but apply, move and make nothing.
    dry_run: bool
    progress: Progress | None


class BacklogFailure(Struct, frozen=True):
    """A file that was not applied. It lies in `failed/` now, with the same reason beside it."""

    path: str
    reason: str


class BacklogReport(Struct, frozen=True):
    """What became of the files: found = applied + failed + skipped + empty."""

    found: int = 0
    applied: int = 0
    failed: int = 0
    #: Applied by an earlier run that could not move them any more.
    skipped: int = 0
    #: Without any statement.
    empty: int = 0
    #: Transactions that were committed.
    transactions: int = 0
    failures: tuple[BacklogFailure, ...] = ()


def drain_backlog(
    folder: Path,
    connection: Connection,
    *,
    tables: Collection[str],
    max_bytes: int,
    **options: Unpack[Options],
) -> BacklogReport:
    """Apply the files `*.sql` of a folder in the order of their names, and move them.

    They go to `done/`, or to `failed/` with the reason beside them. They may write Helena's own
    tables and `tables`, each `name` or `schema.name`. A file with more than `max_bytes` fails.
    `connection` is in autocommit mode. An absent folder is empty, and then nothing is asked of the
    database. Raises DatabaseUnreachable or DatabaseRefused when the reason lies in no file: those
    that are not applied lie in the folder as before. Raises SchemaMissing, and HelenaError for a
    folder that cannot be used.
    """
    dry_run = options.get("dry_run", False)
    with Claims(folder, PATTERN, dry_run=dry_run) as claims:
        drain = _Drain(claims, connection, tables, max_bytes, options)
        for batch in claims.batches(FILES):
            drain.work_on(batch)
        return drain.report()


class _Drain:
    """One run over a folder, and its counts."""

    def __init__(
        self,
        claims: Claims,
        connection: Connection,
        tables: Collection[str],
        max_bytes: int,
        options: Options,
    ) -> None:
        self._claims = claims
        self._connection = connection
        self._tables = tables
        self._max_bytes = max_bytes
        self._any_sql = options.get("allow_any_sql", False)
        self._dry_run = options.get("dry_run", False)
        self._progress = options.get("progress")
        self._known: frozenset[TableName] | None = None
        self._total = claims.count()
        self._counts = dict.fromkeys(("applied", "failed", "skipped", "empty"), 0)
        self._transactions = 0
        self._failures: list[BacklogFailure] = []

    def report(self) -> BacklogReport:
        """What has happened so far."""
        return BacklogReport(
            found=sum(self._counts.values()),
            transactions=self._transactions,
            failures=tuple(self._failures),
            **self._counts,
        )

    def work_on(self, batch: Iterable[Claimed]) -> None:
        """Read, apply and settle these files, in as many transactions as their size asks for."""
        files: list[File] = []
        for claimed in batch:
            file = self._read(claimed)
            if files and sum(f.size for f in files) + file.size > self._max_bytes:
                self._apply(files)
                files = []
            files.append(file)
        self._apply(files)

    def _read(self, claimed: Claimed) -> File:
        try:
            content = self._claims.read(claimed, self._max_bytes)
        except Unusable as why:
            return File(claimed, refusal=str(why))
        digest = hashlib.sha256(content).hexdigest()
        found: list[Statement] = []
        try:
            for statement in statements(_text(content)):
                self._check(statement)
                # There may be a million words, and they have served their purpose.
                found.append(replace(statement, tokens=()))
        except (Unusable, Unfinished, NotAllowed) as why:
            return File(claimed, digest=digest, size=len(content), refusal=str(why))
        return File(claimed, digest=digest, size=len(content), statements=tuple(found))

    def _check(self, statement: Statement) -> None:
        try:
            if self._any_sql:
                allowlist.check_control(statement)
            else:
                allowlist.check(statement, self._known_tables())
        except NotAllowed as why:
            hint = "" if self._any_sql else f" {ANYTHING}"
            raise NotAllowed(f"line {statement.line}: {why}.{hint}") from None

    def _known_tables(self) -> frozenset[TableName]:
        """The names by which the known tables can be called."""
        if self._known is None:
            self._known = known_tables(self._connection, self._tables)
        return self._known

    def _apply(self, files: list[File]) -> None:
        """Commit all that can be, and settle it.

        When a file has to wait, those before it are committed without it; then it is tried alone.
        """
        size, attempt = len(files), 0
        while files:
            try:
                verdicts = self._commit(files[:size])
            except Interrupted as stop:
                size, attempt = stop.good or 1, attempt + (not stop.good)
                if attempt < ATTEMPTS:
                    time.sleep(0 if stop.good else PAUSE * attempt)
                    continue
                if stop.reason is None:
                    raise translate(stop.error) from stop.error
                verdicts = [Verdict("failed", stop.reason)]
            self._settle(files, verdicts)
            files = files[len(verdicts) :]
            size, attempt = len(files), 0

    def _commit(self, files: list[File]) -> list[Verdict]:
        applying = Applying(self._connection, host=platform.node())
        if self._dry_run:
            return applying.foresee(files)
        try:
            verdicts = applying.commit(files)
        except BaseException:
            _leave(self._connection)
            raise
        self._transactions += 1
        return verdicts

    def _settle(self, files: Iterable[File], verdicts: Iterable[Verdict]) -> None:
        for file, verdict in zip(files, verdicts, strict=False):
            claimed = file.claimed
            self._counts[verdict.outcome] += 1
            if verdict.outcome == "failed":
                reason = _sentence(verdict.reason or "")
                self._failures.append(BacklogFailure(str(claimed.path), reason))
                self._claims.failed(claimed, reason)
            else:
                self._claims.done(claimed)
            if verdict.outcome == "empty":
                log.info("%s holds no statement", claimed.path)
            if self._progress:
                self._progress(sum(self._counts.values()), self._total, claimed.label)


def known_tables(connection: Connection, tables: Collection[str]) -> frozenset[TableName]:
    """The names by which Helena's tables and these, each `name` or `schema.name`, can be called.

    Raises DatabaseUnreachable, DatabaseRefused.
    """
    named = {_split(table) for table in (*schema.TABLES, *tables)}
    names = [name for _, name in named]
    try:
        rows = connection.execute(_VISIBLE, [names]).fetchall()
    except psycopg.Error as error:
        raise translate(error) from error
    visible = {(str(place), str(name)) for place, name, is_visible in rows if is_visible}
    qualified = {table for table in visible if (None, table[1]) in named}
    bare = {(None, name) for place, name in visible if (place, name) in named}
    return frozenset({*named, *qualified, *bare})


def _split(table: str) -> TableName:
    place, _, name = table.rpartition(".")
    return place or None, name


def _text(content: bytes) -> str:
    """Raises Unusable for what PostgreSQL would not take as text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(
            f"it is not UTF-8: byte {error.start:,} is {content[error.start]:#x}"
        ) from None
    if "\0" in text:
        raise Unusable("it contains a NUL character, which PostgreSQL does not store")
    return text


def _sentence(reason: str) -> str:
    """It stands alone in a file and in a table."""
    text = reason[:1].upper() + reason[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _leave(connection: Connection) -> None:
    """End the transaction, whatever has happened. A connection that is lost ended it itself."""
    with suppress(psycopg.Error):
        connection.rollback()
