"""GIN pending lists and dead rows of the tables concerned: cleaned, or said why not."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.cli import run
from helena_cli.database import cleaning
from tests.blockade import Blockade, done, fresh_database
from tests.cluster import Cluster

pytestmark = pytest.mark.postgres

TUPLES = 10_000

SERVERS = {"newest": "postgres", "oldest": "postgres15"}

Helena = Callable[..., Any]


@pytest.fixture(params=SERVERS)
def blockade(request: pytest.FixtureRequest) -> Iterator[Blockade]:
    """A database with a table `tagged` and a long pending list, on each of two releases."""
    server: str = request.getfixturevalue(SERVERS[request.param])
    with fresh_database(server) as dsn, Blockade(dsn) as blockade:
        fill(blockade)
        yield blockade


@pytest.fixture
def helena(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Helena:
    """What `helena clear-locks --json --yes` says."""

    def call(dsn: str, *arguments: str, code: int = 0, **parameters: str) -> Any:
        monkeypatch.setenv("HELENA_STATE_DIR", str(state_dir))
        monkeypatch.setenv("HELENA_DSN", make_conninfo(dsn, **parameters))
        capsys.readouterr()
        assert run(["clear-locks", "--json", "--yes", *arguments]) == code
        return json.loads(capsys.readouterr().out)

    return call


def fill(blockade: Blockade) -> None:
    try:
        blockade.sql("CREATE EXTENSION pgstattuple")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("This server has no pgstattuple.")
    blockade.sql(
        "CREATE TABLE tagged (tags text[]);"
        "CREATE INDEX tagged_tags ON tagged USING gin (tags) WITH (gin_pending_list_limit = 65536);"
        "GRANT SELECT ON tagged TO PUBLIC"
    )
    blockade.sql(f"INSERT INTO tagged SELECT ARRAY[n::text] FROM generate_series(1, {TUPLES}) n")
    assert pending(blockade) == TUPLES


def pending(blockade: Blockade) -> int:
    ((count,),) = blockade.sql("SELECT pending_tuples FROM pgstatginindex('tagged_tags')")
    return int(count)


def test_the_owner_empties_the_list_and_vacuums(blockade: Blockade, helena: Helena):
    owner = blockade.role("", "pg_monitor")
    blockade.sql(f"ALTER TABLE tagged OWNER TO {owner}; DELETE FROM tagged WHERE tags = '{{7}}'")
    document = helena(blockade.dsn, "--table=tagged", user=owner)
    (gin,) = document["gin"]
    assert (gin["index"], gin["table"], gin["result"]) == (
        "tagged_tags",
        "tagged",
        f"emptied, {gin['pages_before']} pages",
    )
    assert (gin["tuples_before"], gin["tuples_after"]) == (TUPLES, 0)
    assert gin["pages_before"] > 0
    (table,) = document["tables"]
    assert (table["table"], table["result"]) == ("tagged", "vacuumed")
    assert pending(blockade) == 0


def test_who_may_vacuum_but_is_not_the_owner_empties_it_by_vacuum(
    blockade: Blockade, helena: Helena
):
    other = blockade.role("", "pg_monitor")
    if blockade.admin.info.server_version >= 170000:
        blockade.sql(f"GRANT MAINTAIN ON tagged TO {other}")
    else:
        blockade.sql(f"ALTER DATABASE {blockade.admin.info.dbname} OWNER TO {other}")
    (gin,) = helena(blockade.dsn, "--table=tagged", user=other)["gin"]
    assert (gin["tuples_before"], gin["tuples_after"]) == (TUPLES, 0)
    assert gin["result"] == "emptied by VACUUM"
    assert pending(blockade) == 0
    blockade.sql(f"ALTER DATABASE {blockade.admin.info.dbname} OWNER TO CURRENT_USER")


def test_who_may_neither_is_told_who_may_and_that_nothing_was_done(
    blockade: Blockade, helena: Helena
):
    document = helena(blockade.dsn, "--table=tagged", code=1, user=blockade.role())
    (gin,), (table,) = document["gin"], document["tables"]
    assert "belongs to postgres" in gin["result"]
    assert "gin_clean_pending_list('tagged_tags')" in gin["remedy"]
    assert table["result"] == "not vacuumed: belongs to postgres"
    assert "VACUUM (ANALYZE) tagged" in table["remedy"]
    # Nor could it look.
    assert (gin["tuples_before"], gin["pages_after"]) == (None, None)
    assert pending(blockade) == TUPLES


def test_the_tables_that_the_ended_session_wrote_to_are_cleaned(blockade: Blockade, helena: Helena):
    root = blockade.session("UPDATE tagged SET tags = '{}'", "LOCK TABLE goods")
    reader = blockade.run("SELECT count(*) FROM goods")
    document = helena(blockade.dsn)
    assert done(document) == [(root.info.backend_pid, "terminate", "terminated")]
    assert reader.succeeded
    tables = {one["table"]: one for one in document["tables"]}
    assert tables.keys() == {"tagged", "goods"}
    assert tables["tagged"]["dead_after"] == 0
    assert pending(blockade) == 0


def test_nothing_is_cleaned_when_that_is_not_wanted(blockade: Blockade, helena: Helena):
    document = helena(blockade.dsn, "--table=tagged", "--no-vacuum")
    assert (document["gin"], document["tables"]) == ([], [])
    assert pending(blockade) == TUPLES


def test_a_locked_table_is_given_up_and_the_others_are_cleaned(blockade: Blockade):
    blockade.sql("CREATE TABLE locked (tags text[]); CREATE INDEX ON locked USING gin (tags)")
    # TRUNCATE locks the index too.
    holder = blockade.session("TRUNCATE locked")
    numbers = [n for (n,) in blockade.sql("SELECT oid::bigint FROM pg_class WHERE relkind = 'r'")]
    with blockade.session(autocommit=True) as connection:
        found = cleaning.clean(connection, numbers, lambda *_: None)
    results = {one.table: one.result for one in found.tables}
    assert results["locked"] == "not vacuumed: locked by another session"
    assert results["tagged"] == "vacuumed"
    (locked,) = [one for one in found.gin if one.table == "locked"]
    assert locked.result == "not emptied: locked by another session"
    assert locked.pages_before is None
    assert pending(blockade) == 0
    assert holder.execute("SELECT 1").fetchone() == (1,)


def test_it_waits_for_no_lock_as_long_as_would_cancel_an_autovacuum(blockade: Blockade):
    """After deadlock_timeout the server would cancel an autovacuum that is in the way."""
    ((oid,),) = blockade.sql("SELECT 'tagged'::regclass::oid::bigint")
    short = []
    query = "SELECT %s::interval < %s::interval"

    def setting(name: str) -> str:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
        return str(row and row[0])

    def look(*_: object) -> None:
        values = [setting("lock_timeout"), setting("deadlock_timeout")]
        short.append((setting("lock_timeout") != "0", connection.execute(query, values).fetchone()))

    with blockade.session(autocommit=True) as connection:
        cleaning.clean(connection, [oid], look)
    assert short == [(True, (True,))]


def test_a_vacuum_that_only_warns_is_no_success(blockade: Blockade):
    """A right that is taken away between the look and the VACUUM."""
    role = blockade.role()
    connection = blockade.session(autocommit=True, user=role)
    cleaner = cleaning._Cleaner(connection)
    ((oid,),) = blockade.sql("SELECT 'tagged'::regclass::oid::bigint")
    (table,) = cleaner.tables([oid])
    cleaner.clean(table._replace(may_vacuum=True))
    (result,) = cleaner.vacuumed
    assert result.result.startswith("not vacuumed: ")
    assert pending(blockade) == TUPLES


def test_without_pgstattuple_the_list_is_emptied_unseen(postgres: str, helena: Helena):
    with fresh_database(postgres) as dsn, Blockade(dsn) as blockade:
        blockade.sql("CREATE INDEX ON goods USING gin (string_to_array(name, ' '))")
        (gin,) = helena(dsn, "--table=goods")["gin"]
    assert (gin["pages_before"], gin["pages_after"], gin["result"]) == (
        None,
        None,
        "emptied, 0 pages",
    )


# Poolers


def test_behind_a_pooler_cleaning_needs_a_way_past_it(
    own_server: Cluster, pgbouncer: str, helena: Helena, monkeypatch: pytest.MonkeyPatch
):
    with contextlib.closing(psycopg.connect(own_server.dsn, autocommit=True)) as admin:
        admin.execute("DROP TABLE IF EXISTS goods")
    with Blockade(own_server.dsn) as blockade:
        root = blockade.session("LOCK TABLE goods")
        blockade.run("SELECT count(*) FROM goods")
        document = helena(pgbouncer)
        assert done(document) == [(root.info.backend_pid, "terminate", "terminated")]
        assert document["tables"] == []
        assert "direct_dsn" in document["not_cleaned"]
        monkeypatch.setenv("HELENA_DATABASE_DIRECT_DSN", own_server.dsn)
        document = helena(pgbouncer, "--table=goods")
        assert [one["result"] for one in document["tables"]] == ["vacuumed"]
        assert document["not_cleaned"] is None
