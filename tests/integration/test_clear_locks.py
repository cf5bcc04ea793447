"""`helena clear-locks` on databases that really hang: it frees them and touches nothing else."""

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.cli import run
from helena_cli.database import clearing, locks, relief
from helena_cli.database.connection import Target
from tests.blockade import Blockade, Waiter, done, emergency, fresh_database
from tests.cluster import Cluster
from tests.hosts import wait_until

pytestmark = pytest.mark.postgres

SERVERS = {"newest": "postgres", "oldest": "postgres15"}

Helena = Callable[..., Any]


@pytest.fixture(params=SERVERS)
def blockade(request: pytest.FixtureRequest) -> Iterator[Blockade]:
    """A fresh database, on each of two releases."""
    server: str = request.getfixturevalue(SERVERS[request.param])
    with fresh_database(server) as dsn, Blockade(dsn) as blockade:
        yield blockade


@pytest.fixture
def newest(postgres: str) -> Iterator[Blockade]:
    """A fresh database, for what does not depend on the release."""
    with fresh_database(postgres) as dsn, Blockade(dsn) as blockade:
        yield blockade


@pytest.fixture
def helena(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Helena:
    """What `helena clear-locks --json` says, of a blockade's database."""

    def call(blockade: Blockade, *arguments: str, code: int = 0, **parameters: str) -> Any:
        # Nothing here is over in a moment, and what is ended or freed goes at once.
        monkeypatch.setattr(locks, "PAUSE", 0.05)
        monkeypatch.setattr(clearing, "PATIENCE", 0.8)
        monkeypatch.setenv("HELENA_STATE_DIR", str(state_dir))
        monkeypatch.setenv("HELENA_DSN", make_conninfo(blockade.dsn, **parameters))
        capsys.readouterr()
        found = run(["clear-locks", "--json", *arguments])
        said = capsys.readouterr()
        assert found == code, said.err
        return json.loads(said.out)

    return call


def test_an_idle_root_is_terminated_and_everybody_behind_it_goes_on(blockade, helena):
    bystander = blockade.session("SELECT 1")
    sleeper = blockade.run("SELECT pg_sleep(60)")
    root, alter, readers = emergency(blockade, "ACCESS EXCLUSIVE")
    before = blockade.pids()
    document = helena(blockade, "--yes")
    assert [(one["pid"], one["action"], one["frees"]) for one in document["plan"]] == [
        (root, "terminate", 21)
    ]
    assert done(document) == [(root, "terminate", "terminated")]
    assert document["remaining"] == 0
    assert all(waiter.succeeded for waiter in (alter, *readers))
    assert before - blockade.pids() == {root}
    assert not sleeper.done.is_set()
    assert bystander.execute("SELECT 2").fetchone() == (2,)


def test_a_queued_statement_is_cancelled_where_that_is_enough(blockade, helena):
    root, alter, readers = emergency(blockade, "ACCESS SHARE")
    before = blockade.pids()
    document = helena(blockade, "--yes")
    assert done(document) == [(alter.pid, "cancel", "cancelled")]
    assert document["plan"][0]["frees"] == 20
    assert document["remaining"] == 0
    assert all(reader.succeeded for reader in readers)
    assert isinstance(alter.error, psycopg.errors.QueryCanceled)
    assert blockade.pids() == before
    assert root in before


def test_a_running_query_at_the_root_is_cancelled_and_not_terminated(newest, helena):
    runner = newest.session("LOCK TABLE goods IN ACCESS EXCLUSIVE MODE")
    query = newest.run("SELECT pg_sleep(60)", session=runner)
    reader = newest.run("SELECT count(*) FROM goods")
    assert done(helena(newest, "--yes")) == [(query.pid, "cancel", "cancelled")]
    assert reader.succeeded
    assert query.pid in newest.pids()


def test_a_query_that_survives_its_cancelling_is_terminated(newest, helena):
    runner = newest.session("LOCK TABLE goods IN ACCESS EXCLUSIVE MODE")
    stubborn = (
        "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(60);"
        " EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$"
    )
    query = newest.run(stubborn, session=runner)
    reader = newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes")
    assert [one["action"] for one in document["applied"]] == ["cancel"]
    assert "terminated" in document["applied"][0]["result"]
    assert reader.succeeded
    assert query.pid not in newest.pids()


def test_a_lock_that_outlives_the_cancelled_query_is_freed_too(newest, helena):
    # A savepoint keeps what was locked before it.
    runner = newest.session("LOCK TABLE goods", "SAVEPOINT s")
    query = newest.run("SELECT pg_sleep(60)", session=runner)
    reader = newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes")
    assert document["remaining"] == 0
    assert [(pid, action) for pid, action, _ in done(document)] == [
        (query.pid, "cancel"),
        (query.pid, "terminate"),
    ]
    assert reader.succeeded


def test_a_chain_of_three_levels_is_freed_to_its_end(blockade, helena, monkeypatch):
    monkeypatch.setattr(relief, "GRACE", 0.5)
    first = blockade.session("UPDATE goods SET name = 'b' WHERE id = 1")
    second = blockade.session("UPDATE goods SET name = 'b' WHERE id = 2")
    middle = blockade.run("UPDATE goods SET name = 'c' WHERE id = 1", session=second)
    last = blockade.run("UPDATE goods SET name = 'c' WHERE id = 2")
    document = helena(blockade, "--yes")
    # The second idles in its transaction as soon as it is freed, and holds up the third.
    assert done(document) == [
        (first.info.backend_pid, "terminate", "terminated"),
        (middle.pid, "terminate", "terminated"),
    ]
    assert document["remaining"] == 0
    assert middle.error is None
    assert last.succeeded


def test_a_program_that_was_freed_and_thinks_before_it_commits_is_not_ended(newest, helena):
    newest.session("UPDATE goods SET name = 'b' WHERE id = 1")
    second = newest.session("UPDATE goods SET name = 'b' WHERE id = 2")
    middle = newest.run("UPDATE goods SET name = 'c' WHERE id = 1", session=second)
    last = newest.run("UPDATE goods SET name = 'c' WHERE id = 2")
    document = helena(newest, "--yes", code=1)
    assert [one["pid"] for one in document["applied"]] != [middle.pid]
    assert (document["remaining"], len(document["applied"])) == (1, 1)
    (left,) = document["left_alone"]
    assert left["pid"] == middle.pid
    assert "type again: helena clear-locks" in left["remedy"]
    # The second run takes it for what it is: idle, and in the way.
    assert done(helena(newest, "--yes")) == [(middle.pid, "terminate", "terminated")]
    assert last.succeeded


@pytest.mark.parametrize(
    ("own", "other"), [("UTF8", "LATIN1"), ("LATIN1", "UTF8"), ("SQL_ASCII", "SQL_ASCII")]
)
@pytest.mark.parametrize("server", SERVERS.values())
def test_text_in_another_encoding_does_not_stop_it(request, helena, server, own, other):
    server = request.getfixturevalue(server)
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(Blockade(stack.enter_context(fresh_database(server, encoding))))
            for encoding in (own, other)
        )
        root = here.session("LOCK TABLE goods", client_encoding="latin1")
        for session in (root, there.session(client_encoding="latin1")):
            session.execute(b"SELECT 'caf\xe9'")
        reader = here.run("SELECT count(*) FROM goods")
        document = helena(here, "--yes")
        assert done(document) == [(root.info.backend_pid, "terminate", "terminated")]
        (planned,) = document["plan"]
        shown = "�" if own == "SQL_ASCII" else "é"
        assert planned["query"] == f"SELECT 'caf{shown}'"
        assert reader.succeeded


def test_who_was_freed_and_works_is_not_ended_by_the_same_run(newest, helena):
    root = newest.session("LOCK TABLE goods")
    busy = newest.run("DO 'BEGIN LOCK TABLE goods; PERFORM pg_sleep(60); END'")
    reader = newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes", code=1)
    assert done(document) == [(root.info.backend_pid, "terminate", "terminated")]
    assert document["remaining"] == 1
    assert [one["pid"] for one in document["left_alone"]] == [busy.pid]
    assert not reader.done.is_set()


@pytest.mark.parametrize("catalog", ["pg_class", "pg_proc", "pg_rewrite"])
def test_a_lock_on_the_catalogs_is_freed_from_another_database(blockade, helena, catalog):
    victim = blockade.session(autocommit=True)
    holder = blockade.session(f"LOCK TABLE {catalog}").info.backend_pid
    waiter = Waiter(victim, "SELECT upper(name) FROM goods, pg_views LIMIT 1")
    blockade.waiters.append(waiter)
    with psycopg.connect(make_conninfo(blockade.dsn, dbname="postgres"), autocommit=True) as look:
        waits = "SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted"
        wait_until(lambda: look.execute(waits, [waiter.pid]).fetchone(), "the victim waits")
    document = helena(blockade, "--yes")
    assert document["detour"]
    assert done(document) == [(holder, "terminate", "terminated")]
    assert document["remaining"] == 0
    assert waiter.succeeded


def test_nobody_stays_connected_to_the_template_of_new_databases(own_server, helena):
    own_server.start()
    main = make_conninfo(own_server.dsn, dbname="postgres")
    with psycopg.connect(main, autocommit=True) as admin:
        admin.execute("CREATE DATABASE aside")
    aside = make_conninfo(main, dbname="aside")
    with Blockade(main) as blockade, psycopg.connect(aside, autocommit=True) as admin:
        holder = blockade.session("LOCK TABLE pg_class").info.backend_pid
        server = locks.reach(Target(dsn=main, label="the database", key="k"))
        with server.connection:
            assert server.detour
            # As long as a person thinks about the plan.
            admin.execute("CREATE DATABASE another")
            assert locks.relations(server, ["pg_class"])
        assert done(helena(blockade, "--yes")) == [(holder, "terminate", "terminated")]


@pytest.mark.parametrize("comments", ["", "  -- tidy up\n/* once\na day */ ", "/**/" * 2000])
def test_a_vacuum_is_known_behind_any_comments_at_once(comments):
    assert locks.is_vacuum(f"{comments}Vacuum goods")
    assert not locks.is_vacuum(f"{comments}SELECT 'vacuum'")
    assert not locks.is_vacuum(f"{comments}/* vacuum")


def test_a_vacuum_is_never_cancelled(blockade, helena):
    blockade.sql("INSERT INTO goods SELECT n, 'x' FROM generate_series(11, 40000) n")
    # It sleeps on every page.
    slow = blockade.session(
        "SET vacuum_cost_delay = 100", "SET vacuum_cost_limit = 1", autocommit=True
    )
    vacuum = Waiter(slow, "VACUUM (FREEZE) goods")
    blockade.waiters.append(vacuum)
    running = f"SELECT 1 FROM pg_stat_progress_vacuum WHERE pid = {vacuum.pid}"
    wait_until(lambda: blockade.sql(running), "VACUUM runs")
    alter = blockade.run("ALTER TABLE goods ADD COLUMN note text")
    document = helena(blockade, "--yes", "--all", "--older-than=0", code=1)
    assert document["applied"] == []
    assert [one["pid"] for one in document["left_alone"]] == [vacuum.pid]
    assert "VACUUM" in document["left_alone"][0]["reason"]
    assert document["remaining"] == 1
    reader = blockade.run("SELECT count(*) FROM goods")
    document = helena(blockade, "--yes", "--no-vacuum")
    assert done(document) == [(alter.pid, "cancel", "cancelled")]
    assert reader.succeeded
    assert not vacuum.done.is_set()


def test_a_role_without_privileges_is_told_what_to_do_and_ends_nothing(blockade, helena):
    root, _, _ = emergency(blockade, "ACCESS EXCLUSIVE")
    before = blockade.pids()
    document = helena(blockade, "--yes", code=1, user=blockade.role())
    assert document["applied"] == []
    assert document["remaining"] == 21
    (spared,) = document["left_alone"]
    assert spared["pid"] == root
    assert f"pg_terminate_backend({root})" in spared["remedy"]
    assert blockade.pids() == before


@pytest.mark.parametrize(
    ("membership", "reason"),
    [
        ("pg_read_all_stats", "may not end what belongs to"),
        ("pg_signal_backend", "may not see what it does"),
    ],
)
def test_half_of_the_privileges_ends_nothing(newest, helena, membership, reason):
    root = newest.session("LOCK TABLE goods IN ROW EXCLUSIVE MODE", user=newest.role())
    newest.run("ALTER TABLE goods ADD COLUMN note text")
    before = newest.pids()
    document = helena(newest, "--yes", code=1, user=newest.role("", membership))
    assert document["applied"] == []
    (spared,) = document["left_alone"]
    assert spared["pid"] == root.info.backend_pid
    assert reason in spared["reason"]
    assert "GRANT" in spared["remedy"]
    assert newest.pids() == before


def test_superusers_are_ended_by_superusers_only(newest, helena):
    powerful = newest.role("", "pg_signal_backend", "pg_read_all_stats")
    own = newest.session("LOCK TABLE goods")
    newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes", code=1, user=powerful)
    assert document["applied"] == []
    assert "superuser" in document["left_alone"][0]["reason"]
    own.rollback()
    newest.sql(f"GRANT ALL ON goods TO {powerful}")
    mine = newest.session("LOCK TABLE goods", user=newest.role("", powerful))
    reader = newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes", user=powerful)
    assert done(document) == [(mine.info.backend_pid, "terminate", "terminated")]
    assert reader.succeeded


def test_sessions_of_another_database_are_left_alone(newest, postgres, helena):
    with fresh_database(postgres) as dsn, Blockade(dsn) as other:
        root, _, readers = emergency(other, "ACCESS EXCLUSIVE")
        idle = other.session("SELECT 1")
        arguments = ("--yes", "--all", "--older-than=0", f"--pid={root}")
        document = helena(newest, *arguments, code=1)
        assert document["applied"] == []
        assert {root, idle.info.backend_pid} <= other.pids()
        assert not any(reader.done.is_set() for reader in readers)


def test_advisory_locks_are_left_to_the_programs_unless_they_are_named(newest, helena):
    leader = newest.session("SELECT pg_advisory_lock(7)", autocommit=True)
    follower = newest.run("SELECT pg_advisory_lock(7)")
    document = helena(newest, "--yes")
    assert (document["plan"], document["remaining"]) == ([], 0)
    pid = leader.info.backend_pid
    document = helena(newest, "--yes", f"--pid={pid}")
    assert done(document) == [(pid, "terminate", "terminated")]
    assert follower.succeeded


def test_all_ends_what_blocks_nobody_yet_and_nothing_younger(newest, helena):
    idle = newest.session("SELECT 1")
    long = newest.run("SELECT pg_sleep(60)")
    other = newest.role()
    newest.session("SELECT 1", user=other)
    assert helena(newest, "--yes", "--all")["plan"] == []
    assert helena(newest, "--yes")["plan"] == []
    document = helena(newest, "--yes", "--all", "--older-than=10ms", "--user=postgres")
    assert sorted(done(document)) == sorted(
        [(idle.info.backend_pid, "terminate", "terminated"), (long.pid, "cancel", "cancelled")]
    )


def test_what_was_named_and_could_not_be_done_is_1(newest, helena):
    busy = newest.run("SELECT pg_sleep(60)")
    idle = newest.session("SELECT 1", autocommit=True).info.backend_pid
    stranger = newest.role()
    document = helena(newest, "--yes", f"--pid={busy.pid}", code=1, user=stranger)
    assert (document["applied"], document["remaining"]) == ([], 1)
    assert helena(newest, "--yes", f"--pid={idle}", code=1)["remaining"] == 1
    # The wish of whoever names one that is gone is fulfilled.
    assert helena(newest, "--yes", "--pid=999999999")["remaining"] == 0
    document = helena(newest, "--yes", "--table=goods", code=1, user=stranger)
    assert document["tables"][0]["result"].startswith("not vacuumed")
    assert helena(newest, "--yes", "--table=goods")["tables"][0]["result"] == "vacuumed"
    assert not busy.done.is_set()


def test_what_was_named_and_cancelled_idles_then_and_is_done(newest, helena):
    busy = newest.run("SELECT pg_sleep(60)")
    document = helena(newest, "--yes", f"--pid={busy.pid}")
    assert done(document) == [(busy.pid, "cancel", "cancelled")]
    assert document["remaining"] == 0


def test_who_waits_and_was_named_and_could_not_be_ended_counts_once(newest, helena):
    newest.session("LOCK TABLE goods")
    reader = newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes", f"--pid={reader.pid}", code=1, user=newest.role())
    assert (document["applied"], document["remaining"]) == ([], 1)


def test_the_options_choose_whom_it_ends(newest, helena):
    mine, theirs = newest.role(), newest.role()
    newest.sql("CREATE TABLE others (); GRANT ALL ON goods, others TO PUBLIC")
    first = newest.session("LOCK TABLE goods", user=mine)
    second = newest.session("LOCK TABLE others", user=theirs)
    newest.run("SELECT count(*) FROM goods")
    newest.run("SELECT count(*) FROM others")

    def planned(*arguments: str) -> set[int]:
        document = helena(newest, "--dry-run", *arguments)
        return {one["pid"] for one in document["plan"]}

    both = {first.info.backend_pid, second.info.backend_pid}
    assert planned() == both
    assert planned(f"--user={mine}") == {first.info.backend_pid}
    assert planned("--table=others") == {second.info.backend_pid}
    assert planned("--table", "public.goods") == {first.info.backend_pid}
    assert planned(f"--pid={second.info.backend_pid}") == {second.info.backend_pid}
    assert planned("--older-than=1h") == set()
    document = helena(newest, "--yes", f"--user={mine}", code=1)
    assert document["remaining"] == 1
    assert both & newest.pids() == {second.info.backend_pid}


@pytest.mark.parametrize("wrong", [("--older-than", "soon"), ("--table", "nowhere")])
def test_wrong_usage_is_2_and_changes_nothing(newest, monkeypatch, capsys, wrong):
    monkeypatch.setenv("HELENA_DSN", newest.dsn)
    assert run(["clear-locks", "--yes", *wrong]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "what to do" in said.err


def test_what_was_ended_is_noted_with_its_query_for_the_owner_only(newest, helena, state_dir):
    secret = f"ALTER ROLE {newest.role()} PASSWORD 'hush-hush'"
    root = newest.session("LOCK TABLE goods", secret).info.backend_pid
    newest.run("SELECT count(*) FROM goods")
    document = helena(newest, "--yes", "--no-vacuum")
    assert "hush-hush" not in json.dumps(document)
    path = state_dir / "clear-locks.log"
    (event,) = map(json.loads, path.read_text().splitlines())
    assert (event["pid"], event["action"], event["result"]) == (root, "terminate", "terminated")
    assert event["query"] == secret.replace("hush-hush", "***")
    assert {"at", "host", "by", "database", "user", "application", "frees"} <= event.keys()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.fixture
def special(own_server: Cluster) -> Iterator[Blockade]:
    """A server with prepared transactions."""
    own_server.settings |= {"max_prepared_transactions": "5"}
    own_server.start()
    with fresh_database(own_server.dsn) as dsn, Blockade(dsn) as blockade:
        yield blockade


def test_a_prepared_transaction_is_rolled_back_by_who_may(special, helena):
    session = special.session("UPDATE goods SET name = 'b' WHERE id = 1", "LOCK TABLE goods")
    session.execute("PREPARE TRANSACTION 'it''s 17'")
    reader = special.run("SELECT count(*) FROM goods")
    document = helena(special, "--yes", code=1, user=special.role())
    assert document["applied"] == []
    assert document["left_alone"][0]["gid"] == "it's 17"
    assert "ROLLBACK PREPARED 'it''s 17'" in document["left_alone"][0]["remedy"]
    assert not reader.done.is_set()
    document = helena(special, "--yes")
    (one,) = document["applied"]
    assert (one["pid"], one["gid"], one["result"]) == (None, "it's 17", "rolled back")
    assert document["remaining"] == 0
    assert reader.succeeded
    assert special.sql("SELECT * FROM pg_prepared_xacts") == []


def test_a_prepared_transaction_of_another_encoding_is_no_obstacle(special, helena):
    with fresh_database(special.dsn, "LATIN1") as dsn, Blockade(dsn) as other:
        foreign = other.session("UPDATE goods SET name = 'b'", client_encoding="latin1")
        foreign.execute(b"PREPARE TRANSACTION 'caf\xe9'")
        special.session("LOCK TABLE goods").execute("PREPARE TRANSACTION '17'")
        reader = special.run("SELECT count(*) FROM goods")
        assert [one["gid"] for one in helena(special, "--yes")["applied"]] == ["17"]
        assert reader.succeeded
        other.session(autocommit=True).execute("ROLLBACK PREPARED 'café'")
