"""Between look and deed a session may have changed: then it is not the one that was meant."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace

from helena_cli.database import clearing, locks
from helena_cli.database.blocking import Session
from helena_cli.database.connection import Target
from helena_cli.database.locks import Server
from helena_cli.database.relief import Action, Scope, make_plan
from tests.blockade import Blockade, fresh_database
from tests.hosts import wait_until

pytestmark = pytest.mark.postgres

Change = Callable[[Session], Session]


@pytest.fixture
def blockade(postgres: str) -> Iterator[Blockade]:
    with fresh_database(postgres) as dsn, Blockade(dsn) as blockade:
        yield blockade


@pytest.fixture
def server(blockade: Blockade) -> Iterator[Server]:
    """The way of `clear-locks` into the database."""
    server = locks.reach(Target(dsn=blockade.dsn, label="the database", key="k"))
    with server.connection:
        yield server


def planned(server: Server, session: psycopg.Connection[Any]) -> Action:
    """The plan to end the session, which blocks others."""
    plan = make_plan(locks.look(server), Scope())
    (action,) = [a for a in plan.actions if a.session.pid == session.info.backend_pid]
    return action


@pytest.mark.parametrize(
    "meant",
    [
        lambda s: replace(s, backend_start=s.backend_start - timedelta(hours=1)),
        lambda s: replace(s, xact_start=s.xact_start - timedelta(seconds=1)),
        lambda s: replace(s, state="active"),
        lambda s: replace(s, database="another"),
    ],
)
@pytest.mark.parametrize("deed", ["cancel", "terminate"])
def test_a_pid_that_is_somebody_else_by_now_is_not_touched(
    blockade: Blockade, server: Server, meant: Change, deed: Any
):
    root = blockade.session("LOCK TABLE goods")
    blockade.run("SELECT count(*) FROM goods")
    action = planned(server, root)
    (done,) = clearing.apply(server, [replace(action, session=meant(action.session), deed=deed)])
    assert "touched" in done.result or "ended by itself" in done.result
    assert root.execute("SELECT 1").fetchone() == (1,)


def test_a_session_that_blocks_nobody_is_spared_when_it_has_gone_on(
    blockade: Blockade, server: Server
):
    idle = blockade.session("SELECT 1")
    look = locks.look(server)
    (action,) = make_plan(look, Scope(everything=True, older_than=0.0)).actions
    idle.execute("SELECT 2")
    (done,) = clearing.apply(server, [action])
    assert (done.succeeded, "not touched" in done.result) == (True, True)
    assert idle.execute("SELECT 3").fetchone() == (3,)


def test_a_session_that_has_ended_by_itself_is_no_failure(blockade: Blockade, server: Server):
    root = blockade.session("LOCK TABLE goods")
    blockade.run("SELECT count(*) FROM goods")
    action = planned(server, root)
    root.close()
    wait_until(lambda: action.session.pid not in blockade.pids(), "the session is gone")
    (done,) = clearing.apply(server, [action])
    assert (done.result, done.succeeded) == ("had ended by itself", True)


def test_a_look_leaves_nothing_in_the_session_and_takes_no_lock_of_a_table(
    blockade: Blockade, server: Server
):
    blockade.session("LOCK TABLE goods")
    blockade.run("SELECT count(*) FROM goods")
    locks.look(server)
    assert server.connection.execute("SHOW lock_timeout").fetchone() == ("0",)
    assert server.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    goods = locks.relations(server, ["goods"])
    held = "SELECT count(*) FROM pg_locks WHERE relation = ANY(%(oids)s) AND pid = %(pid)s"
    values = {"oids": list(goods), "pid": server.connection.info.backend_pid}
    assert blockade.sql(held, values) == [(0,)]


def test_whoever_lets_go_between_two_looks_blocks_nobody(blockade: Blockade, server: Server):
    root = blockade.session("LOCK TABLE goods")
    waiter = blockade.run("SELECT count(*) FROM goods")

    def meanwhile(_: float) -> None:
        root.rollback()
        assert waiter.succeeded
        root.execute("LOCK TABLE goods")
        blockade.run("SELECT count(*) FROM goods")

    found = locks.lasting_look(server, meanwhile)
    assert found.edges() == {}
    # Somebody waits all the same, but not yet for long.
    assert len(locks.look(server).edges()) == 1
