"""The engine in one process, on a real database: when it writes, and what may go wrong."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli import config
from helena_cli import runtime as runtime_module
from helena_cli.batch import engine as engine_module
from helena_cli.batch.cycle import Cycle, Policy
from helena_cli.batch.engine import Engine
from helena_cli.batch.flush import Writer
from helena_cli.batch.lease import Lease
from helena_cli.batch.ledger import Flusher, Lane
from helena_cli.batch.spool import Spool
from helena_cli.database import schema
from helena_cli.database.connection import connect, resolve
from helena_cli.database.writer import PostgresWriter
from helena_cli.errors import ConfigurationError, HelenaError, SpoolFull
from helena_cli.runtime import Runtime
from tests.hosts import Host, wait_until
from tests.proxy import Proxy
from tests.spools import Clock

pytestmark = pytest.mark.postgres

#: An interval that no test lives to see, and a size that no test reaches.
NEVER = {"HELENA_BATCH_INTERVAL": "3600", "HELENA_BATCH_SIZE": "5000"}
SOON = Policy(interval=0.1)


def add(runtime: Runtime, *numbers: int) -> None:
    for number in numbers:
        runtime.engine.add_operation("insert", "numbers", {"n": number})


class Relay:
    """Passes everything on to a real writer; tests break single methods of it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def path_of_parts(host: Host) -> Path:
    return host.state_dir / "parts.spool"


def make_cycle(
    host: Host,
    spool: Spool,
    *,
    wrap: Callable[[Writer], Any] = Relay,
    clock: Callable[[], float] = time.time,
    policy: Policy = SOON,
) -> tuple[Cycle, Writer]:
    """A cycle with a writer of its own; whoever asks for it closes both."""
    target = resolve(config.load(environ=host.variables))
    writer = wrap(PostgresWriter(lambda name: connect(target, application=name), host="test"))
    return Cycle(spool, writer, policy, clock=clock), writer


@contextmanager
def engine_of_parts(
    host: Host, *, wrap: Callable[[Writer], Any] = Relay, policy: Policy = SOON
) -> Iterator[tuple[Engine, Spool, Spool]]:
    """An engine, its callers' spool and its flusher's, so that one of them can be broken."""
    path = path_of_parts(host)
    spool, cycle_spool = Spool.open(path), Spool.open(path)
    cycle, writer = make_cycle(host, cycle_spool, wrap=wrap, policy=policy)
    engine = Engine(spool, cycle_spool, cycle, writer, Lease(path.with_suffix(".lease")))
    try:
        yield engine, spool, cycle_spool
    finally:
        engine.close()
        spool.close()


# When it writes


def test_single_operation_is_written_after_the_interval_without_another_call(host: Host):
    with host.runtime() as runtime:
        add(runtime, 0)
        wait_until(lambda: host.numbers() == [0], "the interval passes")


def test_the_operation_that_makes_the_size_full_is_written_with_all_before_it(host: Host):
    with host.runtime(**NEVER | {"HELENA_BATCH_SIZE": "100"}) as runtime:
        add(runtime, *range(99))
        assert host.numbers() == []
        add(runtime, 99)
        wait_until(lambda: host.numbers() == list(range(100)), "the size is reached")


def test_flush_returns_when_everything_is_written(host: Host):
    with host.runtime(**NEVER) as runtime:
        add(runtime, *range(10))
        assert runtime.engine.flush(60)
        assert host.numbers() == list(range(10))


def test_flush_of_nothing_returns_at_once_even_without_a_database(far_host: Host, proxy: Proxy):
    proxy.stop()
    with far_host.runtime() as runtime:
        assert runtime.engine.flush()


def test_flush_gives_up_in_its_time_while_the_database_is_away(far_host: Host, proxy: Proxy):
    proxy.stop()
    with far_host.runtime() as runtime:
        add(runtime, 0)
        assert not runtime.engine.flush(0.3)
        proxy.start()
        assert runtime.engine.flush(60)
    far_host.assert_written_once(1)


def test_flush_sees_what_another_process_queued(host: Host):
    script = """
from helena_cli import config
from helena_cli.runtime import Runtime
Runtime(config.load()).spool.append("insert", "numbers", {"n": 0})
"""
    with host.runtime(**NEVER) as runtime:
        assert host.run(script).returncode == 0
        assert runtime.engine.flush(60)
        assert host.numbers() == [0]


def test_flush_is_heard_by_the_flusher_in_another_process(host: Host):
    with host.runtime(**NEVER) as first, host.runtime(**NEVER) as second:
        first.engine.start()
        wait_until(lambda: first.engine.flushing, "the first has the lease")
        add(second, 0)
        assert second.engine.flush(60)
        assert host.numbers() == [0]
        assert first.engine.flushing
        assert not second.engine.flushing


def test_the_flusher_gives_signs_of_life(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "HEARTBEAT", 0.01)
    with host.runtime() as runtime:
        runtime.engine.start()
        first = wait_until(runtime.spool.flusher, "the first sign of life")
        assert first.pid == os.getpid()

        def beats() -> bool:
            flusher = runtime.spool.flusher()
            return flusher is not None and flusher.heartbeat > first.heartbeat

        wait_until(beats, "another sign of life")


@pytest.mark.parametrize("limit", [("MAINTENANCE_SECONDS", 0.1), ("MAINTENANCE_BYTES", 8)])
def test_pending_lists_are_emptied_after_some_time_and_after_many_bytes(
    host: Host, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, float]
):
    maintained: list[frozenset[str]] = []

    class Listening(Relay):
        def maintain(self, tables: frozenset[str]) -> None:
            self._writer.maintain(tables)
            maintained.append(tables)

    with engine_of_parts(host, wrap=Listening) as (engine, _, _):
        engine.add_operation("insert", "numbers", {"n": 0})
        assert engine.flush(60)
        engine.add_operation("insert", "numbers", {"n": 1})
        assert engine.flush(60)
        assert not maintained
        monkeypatch.setattr(engine_module, *limit)
        wait_until(lambda: maintained == [{"numbers"}], "maintenance")


# Threads


def test_operations_of_many_threads_are_all_written_once(host: Host):
    with host.runtime() as runtime:
        threads = [
            threading.Thread(target=add, args=(runtime, *range(first, first + 500)))
            for first in range(0, 4000, 500)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime.engine.flush(60)
    host.assert_written_once(4000)


def test_threads_that_all_come_first_get_one_engine(host: Host):
    with host.runtime() as runtime:
        together = threading.Barrier(8)

        def first_use(number: int) -> None:
            together.wait()
            add(runtime, number)

        threads = [threading.Thread(target=first_use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("helena-flusher") == 1
    host.assert_written_once(8)


def test_without_a_thread_flush_and_close_do_its_work(host: Host, monkeypatch: pytest.MonkeyPatch):
    """From Python 3.12 on an interpreter that ends starts no threads."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with host.runtime(**NEVER) as runtime:
        add(runtime, 0)
        assert runtime.engine.flush(60)
        assert host.numbers() == [0]
        add(runtime, 1)
    host.assert_written_once(2)


# The end


def test_a_closed_engine_refuses_clearly_and_closes_twice(host: Host):
    with host.runtime() as runtime:
        engine = runtime.engine
        add(runtime, 0)
        assert engine.close() == 0
        for use in (
            lambda: engine.add_operation("insert", "numbers", {"n": 1}),
            lambda: engine.add_operations([("insert", "numbers", {"n": 1})]),
            engine.flush,
        ):
            with pytest.raises(HelenaError, match="closed"):
                use()
        assert engine.close() == 0
    runtime.close()
    host.assert_written_once(1)


def test_an_end_tries_once_more_although_the_last_flushes_failed(far_host: Host, proxy: Proxy):
    proxy.stop()
    with far_host.runtime() as runtime:
        add(runtime, 0)
        wait_until(lambda: (f := runtime.engine.failure) and f.count >= 2, "two failures")
        proxy.start()
    far_host.assert_written_once(1)


def test_what_a_process_left_to_a_flusher_that_was_about_to_end_is_written(host: Host):
    """Its last operation comes after the last flush and before the lease is free."""
    path = path_of_parts(host)

    late = [1]

    class Late(Relay):
        def close(self) -> None:
            self._writer.close()
            while late:
                guest = Spool.open(path)
                guest.append("insert", "numbers", {"n": late.pop()})
                guest.close()
                assert not Lease(path.with_suffix(".lease")).acquire()

    with engine_of_parts(host, wrap=Late) as (engine, _, _):
        engine.add_operation("insert", "numbers", {"n": 0})
        assert engine.close() == 0
    host.assert_written_once(2)


@pytest.mark.parametrize("broken", [False, True])
def test_a_flusher_stuck_at_its_end_frees_the_lease_when_the_line_moves_or_breaks(
    far_host: Host, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, broken: bool
):
    monkeypatch.setattr(engine_module, "GRACE", 0.1)
    with far_host.runtime() as runtime:
        engine = runtime.engine
        add(runtime, 0)
        assert engine.flush(60)
        proxy.stalled = True
        add(runtime, 1)
        assert engine.close(timeout=0.1) == 1
        assert engine.flushing
        if broken:
            proxy.cut()
        proxy.stalled = False
        wait_until(lambda: not engine.flushing, "the lease is free")
    with far_host.runtime() as runtime:
        assert runtime.engine.flush(60)
    far_host.assert_written_once(2)


# Failures


def test_an_unexpected_error_is_counted_and_does_not_end_the_flusher(host: Host):
    errors = [ZeroDivisionError("division by zero")]

    class Broken(Relay):
        def write(self, *batch: Any, **calls: Any) -> Any:
            if errors:
                raise errors.pop()
            return self._writer.write(*batch, **calls)

    with engine_of_parts(host, wrap=Broken) as (engine, spool, _):
        engine.add_operation("insert", "numbers", {"n": 0})
        assert engine.flush(60)
        flushes = spool.flushes()
        assert (flushes.failures, flushes.count) == (1, 1)
    host.assert_written_once(1)


@pytest.mark.parametrize(
    "step",
    ["standing", "straight", "remember_nonce", "sync", "settle_straight", "learn_target"],
)
def test_a_disk_that_is_full_at_any_step_loses_and_doubles_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
):
    with engine_of_parts(host) as (engine, _, cycle_spool):
        real, full = getattr(cycle_spool, step), [SpoolFull("full", remedy="Free some.")]

        def once(*arguments: Any, **named: Any) -> Any:
            if full:
                raise full.pop()
            return real(*arguments, **named)

        monkeypatch.setattr(cycle_spool, step, once)
        engine.add_operations(("insert", "numbers", {"n": n}) for n in range(3))
        assert engine.flush(60)
        assert not full
    assert "Free some." in caplog.text
    assert "bug" not in caplog.text
    host.assert_written_once(3)


def test_a_batch_that_takes_too_long_does_not_cost_its_first_operations(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    """A slow database is no reason to give an operation up before it was tried alone, often."""
    monkeypatch.setattr(PostgresWriter, "STATEMENT_TIMEOUT", 50)
    host.sql("CREATE TABLE slow ()")
    host.sql(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN IF EXISTS (SELECT FROM slow) THEN PERFORM pg_sleep(1); END IF; RETURN NEW; END'"
    )
    host.sql("CREATE TRIGGER wait BEFORE INSERT ON numbers FOR EACH ROW EXECUTE FUNCTION wait()")
    host.sql("INSERT INTO slow DEFAULT VALUES")
    spool = Spool.open(path_of_parts(host))
    spool.extend(("insert", "numbers", {"n": n}) for n in range(8))
    cycle, writer = make_cycle(host, spool)
    try:
        # 8, 4, 2, 1, and the one alone three times more.
        for _ in range(7):
            assert not cycle.turn(force=True)
        assert spool.dead_letters() == []
        host.sql("DELETE FROM slow")
        while cycle.turn(force=True):
            pass
    finally:
        cycle.close()
        writer.close()
        spool.close()
    host.assert_written_once(8)


def test_a_clock_that_is_set_back_does_not_put_off_the_next_try(far_host: Host, proxy: Proxy):
    clock = Clock(time.time())
    spool = Spool.open(path_of_parts(far_host), clock=clock)
    spool.append("insert", "numbers", {"n": 0})
    clock.now += 1
    cycle, writer = make_cycle(far_host, spool, clock=clock)
    try:
        proxy.stop()
        assert not cycle.turn()
        proxy.start()
        clock.now -= 3600
        assert cycle.turn()
    finally:
        cycle.close()
        writer.close()
        spool.close()
    far_host.assert_written_once(1)


def test_processes_that_find_no_database_do_not_make_the_spool_forget_its_last_flush(
    far_host: Host, proxy: Proxy
):
    with far_host.runtime() as runtime:
        add(runtime, 0)
    proxy.stop()
    for number in range(1, 21):
        with far_host.runtime() as runtime:
            add(runtime, number)
    proxy.start()
    with far_host.runtime() as runtime:
        assert runtime.engine.flush(60)
        assert runtime.spool.lanes() == []
    far_host.assert_written_once(21)


def test_draining_ends_when_the_flusher_of_the_host_gives_no_sign_of_life(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime_module, "SILENCE", 0.1)
    with host.runtime() as runtime:
        lease = Lease(runtime.spool.path.with_suffix(".lease"))
        assert lease.acquire()
        runtime.spool.beat(Flusher(4711, "here", 0.0, 0.0))
        runtime.spool.append("insert", "numbers", {"n": 0})
        with pytest.raises(HelenaError, match="4711"):
            runtime.drain()
        lease.release()


# Tables and lanes


def lane(runtime: Runtime, table: str) -> Lane | None:
    return next((lane for lane in runtime.spool.lanes() if lane.table == table), None)


def test_a_missing_table_waits_and_says_so_while_the_others_go_on(host: Host):
    with host.runtime() as runtime:
        runtime.engine.add_operation("insert", "later", {"n": 7})
        add(runtime, 0)
        assert runtime.engine.flush(60)
        assert host.numbers() == [0]
        waiting = lane(runtime, "later")
        assert waiting is not None
        assert (waiting.operations, waiting.sqlstate) == (1, "42P01")
        add(runtime, 1)
        assert runtime.engine.flush(60)
        assert host.numbers() == [0, 1]
        host.sql("CREATE TABLE later (n int)")
        wait_until(lambda: host.sql("SELECT n FROM later") == [(7,)], "the table is found")
        wait_until(lambda: lane(runtime, "later") is None, "the lane flows")


@pytest.fixture
def clerk(host: Host) -> Iterator[Host]:
    """The host, whose user may use Helena's own tables and nothing else."""
    role = sql.Identifier(f"clerk_{os.urandom(4).hex()}")
    for statement in (
        "CREATE ROLE {} LOGIN",
        "GRANT USAGE ON SCHEMA helena TO {}",
        "GRANT SELECT ON helena.meta TO {}",
        "GRANT SELECT, INSERT, UPDATE ON helena.spool_position TO {}",
    ):
        host.admin.execute(sql.SQL(statement).format(role))
    name = role.as_string().strip('"')
    host.variables["HELENA_DSN"] = make_conninfo(host.variables["HELENA_DSN"], user=name)
    host.variables["CLERK"] = name
    yield host
    host.admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
    host.admin.execute(sql.SQL("DROP ROLE {}").format(role))


def test_a_forbidden_table_waits_and_flows_after_the_grant(clerk: Host):
    with clerk.runtime() as runtime:
        add(runtime, *range(3))
        assert runtime.engine.flush(60)
        waiting = lane(runtime, "numbers")
        assert waiting is not None
        assert (waiting.operations, waiting.sqlstate) == (3, "42501")
        assert waiting.reason
        clerk.sql(f"GRANT SELECT, INSERT ON numbers TO {clerk.variables['CLERK']}")
        wait_until(lambda: clerk.numbers() == [0, 1, 2], "the lane flows")
    clerk.assert_written_once(3)


@pytest.fixture
def family(host: Host) -> Host:
    host.sql("CREATE TABLE parents (id int PRIMARY KEY)")
    host.sql("CREATE TABLE children (id int, parent int REFERENCES parents)")
    return host


def test_a_child_that_comes_before_its_parent_is_written_after_it(family: Host):
    with family.runtime() as runtime:
        runtime.engine.add_operation("insert", "children", {"id": 1, "parent": 1})
        # What is held does not keep a flush open.
        assert runtime.engine.flush(60)
        assert family.sql("SELECT * FROM children") == []
        runtime.engine.add_operation("insert", "parents", {"id": 1})
        wait_until(lambda: family.sql("SELECT * FROM children") == [(1, 1)], "the child")
        assert runtime.spool.dead_letters() == []


def test_a_child_without_a_parent_is_a_dead_letter_and_can_be_tried_again(family: Host):
    with engine_of_parts(family, policy=Policy(interval=0.1, hold_at_least=0.0)) as (
        engine,
        spool,
        _,
    ):
        engine.add_operation("insert", "children", {"id": 1, "parent": 1})
        engine.add_operation("insert", "parents", {"id": 2})
        (letter,) = wait_until(spool.dead_letters, "a dead letter")
        assert (letter.table, letter.sqlstate) == ("children", "23503")
        assert letter.constraint == "children_parent_fkey"
        assert family.sql("SELECT * FROM parents") == [(2,)]
        family.sql("INSERT INTO parents VALUES (1)")
        assert spool.retry([letter.id]) == 1
        assert engine.flush(60)
    assert family.sql("SELECT * FROM children") == [(1, 1)]
    law = family.law()
    assert (law.accepted, law.written, law.dead) == (2, 2, 0)


def test_without_helenas_tables_everything_waits_until_they_are_made(dsn: str, state_dir: Path):
    host = Host(dsn, state_dir)
    with host.runtime() as runtime:
        add(runtime, 0)
        assert not runtime.engine.flush(0.5)
        failure = runtime.engine.failure
        assert failure is not None
        assert "helena init" in failure.remedy
        assert host.numbers() == []
        schema.initialise(host.admin)
        assert runtime.engine.flush(60)
    host.assert_written_once(1)
    host.close()


# Which spool, which database


def test_another_database_under_the_same_address_gets_nothing_until_somebody_says_so(host: Host):
    with host.runtime() as runtime:
        add(runtime, 0)
    host.sql("UPDATE helena.meta SET id = gen_random_uuid()")
    with host.runtime() as runtime:
        add(runtime, 1)
        assert not runtime.engine.flush(0.5)
        failure = runtime.engine.failure
        assert failure is not None
        assert isinstance(failure.cause, ConfigurationError)
    assert host.numbers() == [0]
    spool = host.spool()
    spool.renew_identity("its database is another one now")
    (letter,) = spool.dead_letters()
    spool.retry([letter.id])
    spool.close()
    with host.runtime() as runtime:
        assert runtime.engine.flush(60)
    host.assert_written_once(2)


@pytest.fixture
def two_names(host: Host, proxy: Proxy) -> Iterator[tuple[Host, Host]]:
    """One machine that knows its database by two addresses."""
    other = Host(proxy.dsn, host.state_dir, admin=host.variables["HELENA_DSN"])
    yield host, other
    other.close()


def flush_one(host: Host, number: int) -> Path:
    """Write a number in a process of its own; the spool that it used."""
    with host.runtime() as runtime:
        add(runtime, number)
        assert runtime.engine.flush(60)
        return runtime.spool.path


def test_two_names_of_a_database_lead_to_one_spool_after_the_first_contact(
    two_names: tuple[Host, Host],
):
    first, second = two_names
    known, own = flush_one(first, 0), flush_one(second, 1)
    assert known != own
    assert flush_one(second, 2) == flush_one(first, 3) == known
    # What lies in the spool of the other name is written first, from there.
    left = Spool.open(own)
    left.append("insert", "numbers", {"n": 4})
    left.close()
    assert flush_one(second, 5) == own
    assert flush_one(second, 6) == known
    assert first.numbers() == list(range(7))


@pytest.mark.parametrize("content", ["", "gone.spool", "gone.spool\nid"])
def test_a_broken_note_of_a_name_is_replaced(two_names: tuple[Host, Host], content: str):
    first, second = two_names
    own = flush_one(second, 0)
    for note in (*first.state_dir.glob("*.target"), own.with_suffix(".alias")):
        note.write_text(content)
    assert flush_one(second, 1) == own
    flush_one(first, 2)
    assert flush_one(first, 3) == own


def test_a_name_whose_spool_became_another_databases_is_its_own_again(
    two_names: tuple[Host, Host],
):
    first, second = two_names
    known, own = flush_one(first, 0), flush_one(second, 1)
    assert flush_one(second, 2) == known
    spool = Spool.open(known)
    spool.renew_identity("its database is another one now")
    spool.learn_target("another")
    spool.close()
    assert flush_one(second, 3) == own
    assert first.numbers() == list(range(4))


def test_connections_say_who_they_are(host: Host, helena_dsn: str):
    with host.runtime() as runtime:
        add(runtime, 0)
        assert runtime.engine.flush(60)
        query = (
            "SELECT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with psycopg.connect(helena_dsn) as connection:
            names = {name for (name,) in connection.execute(query)}
    assert "helena flush" in names


def test_nobody_begins_to_write_while_the_spool_is_being_renewed(host: Host):
    with host.runtime() as person, host.runtime() as script:
        with person.no_flusher():
            script.engine.add_operation("insert", "numbers", {"n": 0})
            assert not script.engine.flush(1.0)
        assert script.engine.flush(60)
    host.assert_written_once(1)
