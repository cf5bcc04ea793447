"""The tables that Helena knows, and its own bookkeeping in the schema `helena`.

`sql/NN_*.sql` are the numbered steps of the schema `helena`, `sql/tables.sql` the tables of
documents, messages and contexts. Each file can be run again and again: what exists is left alone.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from importlib import resources

import psycopg

from helena_cli.database.connection import Connection, translate
from helena_cli.errors import DatabaseRefused, HelenaError, SchemaMissing

logger = logging.getLogger(__name__)

TABLES = (
    "es_document_references",
    "es_document_usage_log",
    "messages",
    "agent_contexts",
    "documents",
)

#: Any constant will do, as long as every Helena uses the same.
_LOCK = 0x48454C454E41
_LOCK_TIMEOUT = "10s"

_HEAD = """\
-- Helena's tables. Safe to run again: what exists is used as it is.
BEGIN;
SET LOCAL lock_timeout = '{timeout}';
-- Two at once would both find nothing and create everything.
SELECT pg_advisory_xact_lock({lock});
DO $helena$
DECLARE
    found integer := 0;
BEGIN
    IF to_regclass('helena.meta') IS NOT NULL THEN
        SELECT version INTO found FROM helena.meta;
    END IF;
    IF found > {version} THEN
        RAISE EXCEPTION 'schema helena has version %, this script makes version {version}', found
            USING HINT = 'Use the newer Helena.';
    END IF;
END
$helena$;
"""

_BY_HAND = (
    "Let somebody who may create schemas and tables run the SQL once:"
    " helena init --print | psql -v ON_ERROR_STOP=1 DATABASE"
)


@functools.cache
def _files() -> tuple[str, ...]:
    """The text of the numbered steps in their order, and of the tables at last."""
    folder = resources.files("helena_cli.database") / "sql"
    files = {file.name: file for file in folder.iterdir() if file.name.endswith(".sql")}
    steps = sorted(name for name in files if name[0].isdigit())
    return tuple(files[name].read_text("utf-8") for name in (*steps, "tables.sql"))


def version() -> int:
    """The version of the schema `helena` that this program knows: its number of steps."""
    return len(_files()) - 1


def sql() -> str:
    """The whole script, for a person with psql."""
    head = _HEAD.format(lock=_LOCK, timeout=_LOCK_TIMEOUT, version=version())
    return "\n".join((head, *_files(), "COMMIT;\n"))


def initialise(connection: Connection) -> list[str]:
    """Create what is missing, bring the schema `helena` up to date, and say what was done.

    One transaction; any number of processes may do it at once. When nothing is missing, nothing is
    changed and no right to create is needed. `connection` must be outside a transaction. Raises
    SchemaMissing when the database belongs to a newer Helena, DatabaseRefused, DatabaseUnreachable.
    """
    try:
        with connection.transaction():
            found, tables = _state(connection)
        if found == version() and len(tables) == len(TABLES):
            return []
        with _notices(connection), connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
            # Another process may have been faster.
            found, tables = _state(connection)
            for file in _files():
                connection.execute(file)
    except psycopg.Error as error:
        raise _explain(error) from error
    created = [] if found == version() else [f"schema helena, version {version()}"]
    return created + [f"table {name}" for name in TABLES if name not in tables]


def add_inspection(connection: Connection) -> None:
    """Let `status` and `clear-locks` look into the pending lists of GIN indexes.

    For a database that is Helena's own. Without the extension, or when another process adds it at
    the same moment, nothing changes.
    """
    present = "SELECT 1 FROM pg_extension WHERE extname = 'pgstattuple'"
    try:
        if connection.execute(present).fetchone() is None:
            with connection.transaction():
                connection.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
                connection.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple")
    except psycopg.Error as error:
        logger.debug("no pgstattuple: %s", error)


def target_id(connection: Connection) -> str:
    """The id of this database, made once by `initialise`.

    Raises SchemaMissing when there is none, or when the schema `helena` is older or newer than this
    program, DatabaseRefused, DatabaseUnreachable.
    """
    try:
        row = connection.execute("SELECT id::text, version FROM helena.meta").fetchone()
    except psycopg.Error as error:
        raise translate(error) from error
    if row is None:
        raise SchemaMissing(
            "The table helena.meta of this database is empty: its id is lost.",
            remedy="Drop the empty table helena.meta and run: helena init.",
        )
    _refuse_other(row[1])
    return str(row[0])


def _refuse_other(found: int) -> None:
    if found < version():
        raise SchemaMissing(
            f"The schema helena of this database has version {found}; this Helena needs "
            f"{version()}.",
            remedy="Run: helena init.",
        )
    if found > version():
        raise SchemaMissing(
            f"The schema helena of this database has version {found}; this Helena knows only "
            f"{version()}.",
            remedy="Upgrade Helena on this machine: pip install --upgrade helena-cli.",
        )


def _state(connection: Connection) -> tuple[int, frozenset[str]]:
    """The version of the schema `helena` (0: absent), and which tables the search path finds."""
    # Reading pg_class, and only once in a transaction: taking its lock is what makes a session hear
    # of tables made by others while it waited for the advisory lock. to_regclass alone would go on
    # answering from its cache that there is none.
    rows = connection.execute(
        "SELECT relname FROM pg_class WHERE relname = ANY(%s) AND pg_table_is_visible(oid)"
        " UNION ALL SELECT 'helena.meta' WHERE to_regclass('helena.meta') IS NOT NULL",
        [list(TABLES)],
    ).fetchall()
    present = frozenset(str(row[0]) for row in rows)
    found = 0
    if "helena.meta" in present:
        row = connection.execute("SELECT version FROM helena.meta").fetchone()
        found = int(row[0]) if row else 0
    if found > version():
        _refuse_other(found)
    return found, present - {"helena.meta"}


@contextlib.contextmanager
def _notices(connection: Connection) -> Iterator[None]:
    """What the script has to say, such as a foreign key left out, goes to the log."""

    def log(notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            logger.warning("%s", notice.message_primary)

    connection.add_notice_handler(log)
    try:
        yield
    finally:
        connection.remove_notice_handler(log)


def _explain(error: psycopg.Error) -> HelenaError:
    """A missing right has a remedy of its own here: somebody else can run the script."""
    explained = translate(error)
    if error.sqlstate == "42501":
        return DatabaseRefused(str(explained), remedy=_BY_HAND, sqlstate=error.sqlstate)
    return explained
