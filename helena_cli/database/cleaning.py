"""Empties GIN pending lists and vacuums tables, and says what that changed.

Needs a connection of its own, straight to the server: VACUUM runs in no transaction. A lock is
waited for half a second at most; after a whole one PostgreSQL would cancel an autovacuum for it.
"""

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import sql
from psycopg.rows import namedtuple_row

from helena_cli.database.connection import Connection, translate
from helena_cli.errors import DatabaseUnreachable

log = logging.getLogger(__name__)

#: A session that wrote to more tables than this: the rest is left to autovacuum.
MOST_TABLES = 20

#: To look at a list takes a moment, to empty one may take minutes, VACUUM as long as it takes.
_LOOK, _EMPTY, _VACUUM = "2s", "10min", "0"

_TABLES = """
SELECT t.oid::bigint AS oid, n.nspname AS schema, t.relname AS name, t.oid::regclass::text AS shown,
       pg_get_userbyid(t.relowner)::text AS owner,
       pg_has_role(t.relowner, 'USAGE') OR pg_has_role(d.datdba, 'USAGE') {maintain} AS may_vacuum
  FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace
  JOIN pg_database d ON d.datname = current_database()
 WHERE t.oid IN (SELECT coalesce(i.indrelid, m.oid, c.oid) FROM pg_class c
                   LEFT JOIN pg_index i ON i.indexrelid = c.oid
                   LEFT JOIN pg_class m ON m.reltoastrelid = c.oid
                  WHERE c.oid = ANY(%s::bigint[]::oid[]))
   AND t.relkind IN ('r', 'm') AND t.relpersistence <> 't'
   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
 ORDER BY pg_stat_get_dead_tuples(t.oid) DESC, t.oid
"""

_INDEXES = """
SELECT x.oid::bigint AS oid, x.oid::regclass::text AS shown,
       pg_has_role(x.relowner, 'USAGE') AS may_clean,
       (SELECT s.nspname FROM pg_extension e JOIN pg_namespace s ON s.oid = e.extnamespace
         WHERE e.extname = 'pgstattuple') AS pgstattuple
  FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid AND x.relkind = 'i'
  JOIN pg_am a ON a.oid = x.relam AND a.amname = 'gin'
 WHERE i.indrelid = %s::bigint::oid AND i.indisvalid AND i.indisready ORDER BY x.oid
"""

REASONS = {
    "55P03": "locked by another session",
    "57014": "it took too long",
    "40P01": "it got into a deadlock",
    "42501": "permission denied",
}


class GinList(Struct, frozen=True):
    """The pending list of one index, before and after; None where it cannot be looked at."""

    index: str
    table: str
    pages_before: int | None
    tuples_before: int | None
    pages_after: int | None
    tuples_after: int | None
    result: str
    remedy: str | None = None


VACUUMED = "vacuumed"


class Vacuumed(Struct, frozen=True):
    """One table, with its dead rows before and after as the server counts them, and the seconds."""

    table: str
    dead_before: int
    dead_after: int
    seconds: float
    result: str
    remedy: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it was vacuumed."""
        return self.result == VACUUMED


class Cleaning(Struct, frozen=True):
    """What was cleaned; `skipped` says why something was not."""

    gin: tuple[GinList, ...] = ()
    tables: tuple[Vacuumed, ...] = ()
    skipped: str | None = None


Progress = Callable[[int, int | None, str], None]


def clean(connection: Connection, relations: Collection[int], progress: Progress) -> Cleaning:
    """Clean these tables, by the oid of the table or of one of its indexes.

    Raises DatabaseUnreachable; whatever else goes wrong is a result.
    """
    cleaner = _Cleaner(connection)
    try:
        tables = cleaner.tables(relations)
        for number, table in enumerate(tables[:MOST_TABLES]):
            progress(number, len(tables), f"cleaning {table.shown}")
            cleaner.clean(table)
    except psycopg.Error as error:
        failure = translate(error)
        if isinstance(failure, DatabaseUnreachable):
            raise failure from error
        return Cleaning(tuple(cleaner.gin), tuple(cleaner.vacuumed), str(failure))
    more = len(tables) - MOST_TABLES
    skipped = f"{more} more tables were left to autovacuum" if more > 0 else None
    return Cleaning(tuple(cleaner.gin), tuple(cleaner.vacuumed), skipped)


def names(connection: Connection, relations: Collection[int]) -> list[str]:
    """What the tables are called that `clean` would clean. Raises what `clean` raises."""
    try:
        return [table.shown for table in _Cleaner(connection).tables(relations)]
    except psycopg.Error as error:
        raise translate(error) from error


class _Outcome(Struct, frozen=True):
    """Why it failed, or the number that it returned."""

    failed: str | None = None
    number: int | None = None


class _Cleaner:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.gin: list[GinList] = []
        self.vacuumed: list[Vacuumed] = []

    def tables(self, relations: Collection[int]) -> list[Any]:
        """The tables, with what may be done to them; the one with the most dead rows first."""
        recent = self._connection.info.server_version >= 170000
        self._connection.execute("SET lock_timeout = '500ms'")
        if recent:
            self._connection.execute("SET transaction_timeout = 0")
        maintain = "OR has_table_privilege(t.oid, 'MAINTAIN')" if recent else ""
        return self._ask(_TABLES.format(maintain=maintain), [[*relations]])

    def clean(self, table: Any) -> None:
        """Its pending lists, then all of it, then a second look at the lists."""
        indexes = self._ask(_INDEXES, [table.oid])
        before = {index.oid: self._pending(index) for index in indexes}
        results = {index.oid: self._empty(index) if index.may_clean else None for index in indexes}
        vacuum = self._vacuum(table)
        self.vacuumed.append(vacuum)
        for index in indexes:
            pages, tuples = before[index.oid]
            pages_after, tuples_after = self._pending(index)
            result, remedy = _told(index, table, results[index.oid], vacuum)
            self.gin.append(
                GinList(
                    index=index.shown,
                    table=table.shown,
                    pages_before=pages,
                    tuples_before=tuples,
                    pages_after=pages_after,
                    tuples_after=tuples_after,
                    result=result,
                    remedy=remedy,
                )
            )

    def _pending(self, index: Any) -> tuple[int | None, int | None]:
        """Pages and tuples of a pending list, if pgstattuple is there and lets us look."""
        if index.pgstattuple is None:
            return None, None
        query = sql.SQL(
            "SELECT pending_pages, pending_tuples FROM {}.pgstatginindex(%s::bigint::oid::regclass)"
        ).format(sql.Identifier(index.pgstattuple))
        try:
            found = self._ask(query, [index.oid])[0]
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            log.info("the pending list of %s cannot be looked at: %s", index.shown, error)
            return None, None
        return found.pending_pages, found.pending_tuples

    def _empty(self, index: Any) -> "_Outcome":
        query = "SELECT gin_clean_pending_list(%s::bigint::oid::regclass)"
        return self._attempt(query, [index.oid], _EMPTY)

    def _vacuum(self, table: Any) -> Vacuumed:
        dead = self._dead(table)
        started = time.monotonic()
        remedy = None
        if table.may_vacuum:
            name = sql.Identifier(table.schema, table.name)
            query = sql.SQL("VACUUM (ANALYZE) {}").format(name)
            failed = self._attempt(query, None, _VACUUM).failed
        else:
            failed = f"belongs to {table.owner}"
            remedy = f"Let {table.owner} or a superuser run: VACUUM (ANALYZE) {table.shown};"
        return Vacuumed(
            table=table.shown,
            dead_before=dead,
            dead_after=self._dead(table),
            seconds=time.monotonic() - started,
            result=f"not vacuumed: {failed}" if failed else VACUUMED,
            remedy=remedy,
        )

    def _attempt(self, query: Any, values: Any, timeout: str) -> "_Outcome":
        """Execute it outside of a transaction; a warning counts as a failure."""
        warnings: list[str] = []

        def note(message: psycopg.errors.Diagnostic) -> None:
            # Not the owner of a table: VACUUM warns, skips it and calls that a success.
            if message.severity_nonlocalized == "WARNING":
                warnings.append(message.message_primary or "a warning without words")

        self._connection.add_notice_handler(note)
        try:
            self._bound(timeout)
            cursor = self._connection.execute(query, values, prepare=False)
            row = cursor.fetchone() if cursor.description else None
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            return _Outcome(REASONS.get(error.sqlstate or "", str(error).partition("\n")[0]))
        finally:
            self._connection.remove_notice_handler(note)
        return _Outcome("; ".join(warnings) or None, row[0] if row else None)

    def _dead(self, table: Any) -> int:
        found = self._ask("SELECT pg_stat_get_dead_tuples(%s::bigint::oid) AS dead", [table.oid])
        return int(found[0].dead or 0)

    def _ask(self, query: Any, values: Any) -> list[Any]:
        self._bound(_LOOK)
        with self._connection.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(query, values, prepare=False).fetchall()

    def _bound(self, timeout: str) -> None:
        self._connection.execute(
            sql.SQL("SET statement_timeout = {}").format(sql.Literal(timeout)), prepare=False
        )


def _told(
    index: Any, table: Any, outcome: _Outcome | None, vacuum: Vacuumed
) -> tuple[str, str | None]:
    """What became of a pending list, and what to do if it was not emptied."""
    if outcome is not None and outcome.failed is None:
        pages = "1 page" if outcome.number == 1 else f"{outcome.number} pages"
        return f"emptied, {pages}", None
    if vacuum.succeeded:
        return "emptied by VACUUM", None
    if outcome is not None:
        return f"not emptied: {outcome.failed}", "Run helena clear-locks again."
    clean = f"SELECT gin_clean_pending_list('{index.shown}');"
    return f"belongs to {table.owner}", f"Let {table.owner} or a superuser run: {clean}"
