"""One transaction of the SQL backlog: its files, each behind a savepoint, and their record."""

from collections.abc import Sequence
from typing import Literal

import psycopg
from msgspec import Struct

from helena_cli.batch.claims import Claimed
from helena_cli.batch.flush import FlushFailed
from helena_cli.database.connection import Connection, translate
from helena_cli.database.failure import LOCK_NOT_AVAILABLE, QUERY_CANCELED, Failure, classify
from helena_cli.database.script import Statement
from helena_cli.database.transaction import Transaction
from helena_cli.errors import DatabaseRefused, DatabaseUnreachable, SchemaMissing

#: Any constant will do, as long as every Helena uses the same.
LOCK = 0x48454C454E42

# A statement of its own: only the next one sees what the holder before has committed.
_ALONE = b"SELECT pg_advisory_xact_lock($1)"

_RECORDED = b"""\
SELECT file_name, content_hash FROM helena.applied_files
 WHERE (file_name, content_hash) IN (SELECT * FROM unnest($1::text[], $2::text[]))"""

_RECORD = b"""\
INSERT INTO helena.applied_files (file_name, content_hash, statements, rows, host)
SELECT *, $5 FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[])"""

OUT_OF_MEMORY = "53200"


class File(Struct, frozen=True):
    """A claimed file that was read and looked at."""

    claimed: Claimed
    #: SHA-256 of its content, "" when it could not be read.
    digest: str = ""
    size: int = 0
    statements: tuple[Statement, ...] = ()
    #: Why it must not be applied.
    refusal: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is recorded by."""
        return self.claimed.label, self.digest


class Verdict(Struct, frozen=True):
    """What became of a file; `reason` when it failed."""

    outcome: Literal["applied", "failed", "skipped", "empty"]
    reason: str | None = None
    rows: int = 0


class Interrupted(Exception):
    """The transaction is lost, not through the files before the one at `good`.

    It may succeed when it is tried again. `reason` says what to tell of that file in the end; None
    when the reason lies elsewhere.
    """

    def __init__(self, error: psycopg.Error, good: int, reason: str | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.good = good
        self.reason = reason


class _Transaction(Transaction):
    """A transaction in which files mean what `script` says they mean."""

    def begin(self, *, lock_timeout: int, statement_timeout: int, idle_timeout: int) -> None:
        super().begin(
            lock_timeout=lock_timeout,
            statement_timeout=statement_timeout,
            idle_timeout=idle_timeout,
        )
        self._later.append("SET LOCAL standard_conforming_strings = on")

    def execute_alone(self, statement: str) -> int:
        """Execute one statement, the server itself taking no second one; how many rows it wrote."""
        self._catch_up()
        # To ask for a binary result is what makes psycopg use the extended protocol.
        self._cursor.execute(statement.encode(), prepare=False, binary=True)
        return max(0, self._cursor.rowcount)


class Applying:
    """One attempt to apply some files. Times in milliseconds."""

    LOCK_TIMEOUT = 5_000
    STATEMENT_TIMEOUT = 10_000
    IDLE_TIMEOUT = 15_000

    def __init__(self, connection: Connection, *, host: str) -> None:
        self._connection = connection
        self._host = host
        self._transaction = _Transaction(connection)

    def foresee(self, files: Sequence[File]) -> list[Verdict]:
        """What would become of them, as far as that can be told without applying them."""
        try:
            recorded = self._recorded(files)
        except psycopg.Error as error:
            raise translate(error) from error
        return [_foregone(file, recorded) or Verdict("applied") for file in files]

    def commit(self, files: Sequence[File]) -> list[Verdict]:
        """Apply and record them. Raises Interrupted, DatabaseUnreachable, DatabaseRefused.

        After an error the transaction may still be open.
        """
        try:
            recorded = self._begin(files)
        except psycopg.Error as error:
            raise self._stop(error, 0) from error
        verdicts: list[Verdict] = []
        for file in files:
            verdict = _foregone(file, recorded)
            verdicts.append(verdict or self._apply(file, good=len(verdicts)))
        try:
            self._record(files, verdicts)
        except psycopg.Error as error:
            raise self._stop(error, 0) from error
        self._commit(len(files))
        return verdicts

    def _begin(self, files: Sequence[File]) -> set[tuple[str, str]]:
        """Alone among all hosts from here on: nobody else applies the same file now."""
        self._transaction.begin(
            lock_timeout=self.LOCK_TIMEOUT,
            statement_timeout=self.STATEMENT_TIMEOUT,
            idle_timeout=self.IDLE_TIMEOUT,
        )
        self._transaction.execute(_ALONE, [LOCK])
        return self._recorded(files)

    def _recorded(self, files: Sequence[File]) -> set[tuple[str, str]]:
        names, digests = zip(*(file.key for file in files), strict=True)
        rows = self._transaction.execute(_RECORDED, [list(names), list(digests)]).fetchall()
        return {(name, digest) for name, digest in rows}

    def _apply(self, file: File, *, good: int) -> Verdict:
        rows, current = 0, file.statements[0]
        try:
            with self._transaction.savepoint():
                for current in file.statements:
                    rows += self._transaction.execute_alone(current.text)
        except psycopg.Error as error:
            reason, state = _explain(error, current), error.sqlstate or ""
            if self._connection.closed or _may_pass(error):
                to_blame = state in (QUERY_CANCELED, OUT_OF_MEMORY) or state.startswith("XX")
                raise self._stop(error, good, reason if to_blame else None) from error
            return Verdict("failed", reason)
        return Verdict("applied", rows=rows)

    def _record(self, files: Sequence[File], verdicts: Sequence[Verdict]) -> None:
        applied = [
            (*file.key, len(file.statements), verdict.rows)
            for file, verdict in zip(files, verdicts, strict=True)
            if verdict.outcome == "applied"
        ]
        if applied:
            columns = [list(column) for column in zip(*applied, strict=True)]
            self._transaction.execute(_RECORD, [*columns, self._host])

    def _commit(self, count: int) -> None:
        try:
            self._transaction.commit()
        except FlushFailed as failed:
            raise DatabaseRefused(f"Nothing was applied: {failed}.", remedy=_LOOK) from failed
        except psycopg.Error as error:
            # Nobody knows which file it was: halve them.
            reason = _explain(error) if count == 1 else None
            raise self._stop(error, count // 2, reason) from error

    def _stop(self, error: psycopg.Error, good: int, reason: str | None = None) -> Exception:
        """Interrupted, unless it makes no sense to try again."""
        translated = translate(error)
        if self._connection.closed or isinstance(translated, DatabaseUnreachable | SchemaMissing):
            return translated
        return Interrupted(error, good, reason)


_LOOK = "The words are PostgreSQL's own; its log may say more."


def _may_pass(error: psycopg.Error) -> bool:
    """Whether another attempt may succeed, with the same file."""
    state = error.sqlstate or ""
    transient = classify(error.sqlstate) is Failure.TRANSIENT
    return transient or state == LOCK_NOT_AVAILABLE or state.startswith(("XX", "58"))


def _foregone(file: File, recorded: set[tuple[str, str]]) -> Verdict | None:
    """The verdict on a file that is not to be applied."""
    if file.key in recorded:
        return Verdict("skipped")
    if file.refusal is not None:
        return Verdict("failed", file.refusal)
    return None if file.statements else Verdict("empty")


def _explain(error: psycopg.Error, statement: Statement | None = None) -> str:
    """What the database said of a statement, where, and what a person can do."""
    diagnostics, state = error.diag, error.sqlstate or "none"
    parts = (diagnostics.message_primary or str(error), diagnostics.message_detail)
    said = ": ".join(part for part in parts if part)[:1000]
    hint = f" {diagnostics.message_hint}" if diagnostics.message_hint else ""
    place = ""
    if statement is not None:
        offset = int(diagnostics.statement_position or 1) - 1
        place = f"line {statement.line + statement.text.count(chr(10), 0, offset)}: "
    return f"{place}{said} (SQLSTATE {state}).{hint} {_remedy(error)}"


def _remedy(error: psycopg.Error) -> str:
    state = error.sqlstate or ""
    if state == QUERY_CANCELED:
        return "It took too long three times: apply it by hand, or in parts."
    if state[:2] == "42" and state not in ("42P01", "42501", "42703"):
        return "Mend the statement."
    return translate(error).remedy
