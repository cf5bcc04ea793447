"""A schema for a trial: copies of the tables that Helena knows, made for one run, then dropped."""

import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from helena_cli.batch.table import Table
from helena_cli.database.catalog import Catalog
from helena_cli.database.connection import Connection, translate
from helena_cli.database.transaction import Transaction
from helena_cli.errors import DatabaseRefused

#: A schema that is older than this, in seconds, was left behind by a run that was killed.
ABANDONED = 3600

_PREFIX = "helena_test_"

_PENDING = "SELECT pending_pages::int8 AS pages FROM {}.pgstatginindex(%s::regclass)"
_PENDING_LIMIT = """\
SELECT setting::int8 * 1024 / current_setting('block_size')::int8 AS pages
  FROM pg_settings WHERE name = 'gin_pending_list_limit'"""
_PGSTATTUPLE = """\
SELECT n.nspname AS name FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname = 'pgstattuple'"""

# Longer than any sound DDL takes; a prepared transaction has no pid.
_LOCKED = """\
SELECT c.relname::text AS name, coalesce(l.pid, 0) AS pid,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8 AS seconds
  FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
  LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND c.relname = ANY(%s) AND c.relnamespace <> 'pg_catalog'::regnamespace
   AND coalesce(a.xact_start < clock_timestamp() - interval '1 second', true)
 ORDER BY 3 DESC"""

#: Table → the columns by which Helena's own operations find its rows.
KEYS: Mapping[str, tuple[str, ...]] = {
    "es_document_references": ("es_doc_id",),
    "es_document_usage_log": ("id",),
    "messages": ("id",),
    "agent_contexts": ("agent_name", "project_id", "context_key"),
    "documents": ("file_path",),
}


class Scratch:
    """The schema of one run, on a connection in autocommit mode. Raises Helena's errors."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.name = f"{_PREFIX}{int(time.time())}_{secrets.token_hex(4)}"

    def table(self, name: str) -> str:
        """A table of this schema, as an operation names it."""
        return f"{self.name}.{name}"

    def create(self) -> None:
        """Make the schema and its tables; drop what earlier runs left behind."""
        for old in self.ask(
            "SELECT nspname AS name FROM pg_namespace WHERE nspname ~ %s"
            " AND pg_has_role(nspowner, 'USAGE')",
            [f"^{_PREFIX}[0-9]+_"],
        ):
            if int(old["name"].split("_")[2]) < time.time() - ABANDONED:
                self._drop(old["name"])
        folder = resources.files("helena_cli.database") / "sql"
        tables = (folder / "tables.sql").read_text("utf-8")
        # In this path nothing is found that exists already.
        self._run(
            sql.SQL("BEGIN; CREATE SCHEMA {0}; SET LOCAL search_path TO {0}; {1}; COMMIT").format(
                sql.Identifier(self.name), sql.SQL(tables)
            )
        )

        # Only with it can one see how long a pending list is; it goes with the schema.
        with suppress(DatabaseRefused):
            self._run(
                sql.SQL("CREATE EXTENSION IF NOT EXISTS pgstattuple SCHEMA {}").format(
                    sql.Identifier(self.name)
                )
            )

    def drop(self, spool_ids: Collection[str]) -> None:
        """Drop the schema, and forget how far its spools came, where that is allowed."""
        self._drop(self.name)
        self._run(
            sql.SQL(
                "DO $$ BEGIN DELETE FROM helena.spool_position WHERE spool_id = ANY({});"
                " EXCEPTION WHEN insufficient_privilege THEN NULL; END $$"
            ).format(sql.Literal(list(spool_ids)))
        )

    def empty(self, name: str) -> None:
        """Remove all rows of a table."""
        self._run(sql.SQL("TRUNCATE {} CASCADE").format(sql.Identifier(self.name, name)))

    def rows(self, name: str, key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """The rows of a table with one of these keys, in the order of the key."""
        query = sql.SQL("SELECT * FROM {} WHERE {} = ANY(%s) ORDER BY {}").format(
            sql.Identifier(self.name, name), sql.Identifier(key), sql.Identifier(key)
        )
        return self.ask(query, [list(values)])

    def count(self, name: str) -> int:
        """How many rows a table has."""
        query = sql.SQL("SELECT count(*) AS n FROM {}").format(sql.Identifier(self.name, name))
        return int(self.ask(query)[0]["n"])

    def pending_pages(self, name: str) -> int | None:
        """The longest pending list of a table's GIN indexes; None without pgstattuple."""
        extension = self.ask(_PGSTATTUPLE)
        if not extension:
            return None
        query = sql.SQL(_PENDING).format(sql.Identifier(extension[0]["name"]))
        try:
            found = [self.ask(query, [index])[0]["pages"] for index in self.gin_indexes(name)]
        except DatabaseRefused as refused:
            if refused.sqlstate != "42501":
                raise
            return None
        return max(found, default=None)

    def pending_limit(self) -> int:
        """How many pages a pending list may have on this server."""
        return int(self.ask(_PENDING_LIMIT)[0]["pages"])

    def gin_indexes(self, name: str) -> list[str]:
        """The GIN indexes of a table, qualified."""
        query = (
            "SELECT x.oid::regclass::text AS name FROM pg_index i JOIN pg_class x"
            " ON x.oid = i.indexrelid JOIN pg_am a ON a.oid = x.relam AND a.amname = 'gin'"
            " WHERE i.indrelid = %s::regclass ORDER BY 1"
        )
        return [row["name"] for row in self.ask(query, [self.table(name)])]

    def clean(self, name: str) -> int:
        """Empty the pending lists of a table; how many pages they had."""
        query = "SELECT gin_clean_pending_list(%s::regclass) AS pages"
        return sum(self.ask(query, [index])[0]["pages"] for index in self.gin_indexes(name))

    def hold(self, name: str) -> None:
        """Lock a table against everybody, on this connection, until `let_go`."""
        self._run(
            sql.SQL("BEGIN; LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(
                sql.Identifier(self.name, name)
            )
        )

    def tables(self) -> dict[str, Table]:
        """The tables that Helena knows and that exist, as an operation would find them."""
        transaction = Transaction(self._connection)
        try:
            transaction.begin(lock_timeout=2000, statement_timeout=5000, idle_timeout=5000)
            found = Catalog().tables(transaction, KEYS)
            transaction.commit()
        except psycopg.Error as error:
            raise translate(error) from error
        return {name: table for name, table in found.items() if isinstance(table, Table)}

    def locked(self) -> list[tuple[str, int, float]]:
        """The known tables that somebody has locked against everybody, by whom, and how long."""
        rows = self.ask(_LOCKED, [list(KEYS)])
        return [(row["name"], row["pid"], row["seconds"]) for row in rows]

    def ask(self, query: str | sql.Composed, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of a question."""
        text = query.encode() if isinstance(query, str) else query
        try:
            with self._connection.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(text, values or None, prepare=False).fetchall()
        except psycopg.Error as error:
            raise translate(error) from error

    def _drop(self, name: str) -> None:
        self._run(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))

    def _run(self, script: sql.Composed) -> None:
        try:
            if self._connection.info.transaction_status:
                self._connection.execute("ROLLBACK", prepare=False)
            self._connection.execute(script, prepare=False)
        except psycopg.Error as error:
            if not self._connection.closed and self._connection.info.transaction_status:
                self._connection.execute("ROLLBACK", prepare=False)
            raise translate(error) from error


def upsert(connection: Connection, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows the way real-time writers do: a statement each. Raises Helena's errors."""
    for row in rows:
        columns = [sql.Identifier(name) for name in row]
        query = sql.SQL(
            "INSERT INTO {} ({}) VALUES ({}) ON CONFLICT (es_doc_id) DO UPDATE SET {}"
        ).format(
            sql.Identifier(*table.split(".")),
            sql.SQL(", ").join(columns),
            sql.SQL(", ").join(sql.Placeholder() for _ in columns),
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(name) for name in columns),
        )
        values = [Jsonb(value) if isinstance(value, dict) else value for value in row.values()]
        try:
            connection.execute(query, values)
        except psycopg.Error as error:
            raise translate(error) from error
