"""A look at a database that hangs: it ends in time, and says who is in the way."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.database.checkup import Checkup, Examination
from helena_cli.database.door import Door
from helena_cli.database.health import Health
from helena_cli.database.target import Target, database_name
from tests.hosts import wait_until
from tests.proxy import Proxy
from tests.sessions import Session, holding, session

pytestmark = pytest.mark.postgres


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path / "barred")


@pytest.fixture
def examine(helena_dsn: str, door: Door) -> Iterator[Callable[..., Examination]]:
    """Looks at the test's database; with another DSN at that one."""

    def look(dsn: str = helena_dsn, *, sparing: bool = False) -> Examination:
        with Checkup(Target(dsn, "the database", "key"), door, sparing=sparing) as checkup:
            return checkup.look()

    yield look


@pytest.fixture
def outside(helena_dsn: str) -> Iterator[Session]:
    """A session in another database of the server."""
    with session(make_conninfo(helena_dsn, dbname="postgres")) as connection:
        yield connection


def found(examination: Examination) -> Health:
    assert examination.health is not None
    return examination.health


def test_a_healthy_database_is_asked_directly_and_left_alone(
    examine: Callable[[], Examination], outside: Session
):
    examination = examine()
    assert examination.error is None
    assert dict(found(examination).unknown) == {}
    assert found(examination).via is None
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'helena status'"
    assert outside.execute(query).fetchone() == (0,)


@pytest.mark.parametrize("relation", ["pg_class", "pg_index"])
def test_when_nobody_gets_in_another_database_says_who_holds_the_door(
    examine: Callable[[], Examination], helena_dsn: str, relation: str
):
    with holding(helena_dsn, f"LOCK TABLE {relation} IN ACCESS EXCLUSIVE MODE") as culprit:
        examination = examine()
    assert f"{relation} is locked by pid {culprit}" in str(examination.error)
    assert "clear-locks" in str(examination.error and examination.error.remedy)
    assert found(examination).via == "postgres"
    assert found(examination).idle_in_transaction == 1


def test_nobody_knocks_again_while_the_door_is_held(
    examine: Callable[[], Examination], helena_dsn: str, outside: Session, door: Door
):
    def at_the_door() -> object:
        # Those who are still being opened show nowhere else before release 18.
        query = (
            "SELECT count(DISTINCT l.pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE NOT granted AND relation = 'pg_class'::regclass AND datname = %s"
        )
        return outside.execute(query, [database_name(Target(helena_dsn, "", ""))]).fetchone()

    with holding(helena_dsn, "LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE"):
        for _ in range(4):
            assert "lets nobody in" in str(examine().error)
        assert at_the_door() == (1,)
        assert door.barred
    assert examine().error is None
    assert not door.barred


def test_a_lock_on_a_catalog_that_lets_one_in_is_named_for_every_question_it_stops(
    examine: Callable[[], Examination], helena_dsn: str
):
    with holding(helena_dsn, "LOCK TABLE pg_proc IN ACCESS EXCLUSIVE MODE") as culprit:
        examination = examine()
    assert examination.error is None
    health = found(examination)
    assert health.response_ms is not None
    assert health.idle_in_transaction == 1
    for question in ("hosts", "tables", "gin"):
        assert health.unknown[question] == f"pg_proc is locked by pid {culprit}"


def test_an_open_connection_sees_the_culprit_by_itself(helena_dsn: str, door: Door):
    with Checkup(Target(helena_dsn, "the database", "key"), door) as checkup:
        assert checkup.look().error is None
        with holding(helena_dsn, "LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE") as culprit:
            # The table is new to the session, so that it has to read the catalog.
            health = found(checkup.look(["brand_new"]))
    assert health.idle_in_transaction == 1
    assert health.unknown["tables"] == f"pg_class is locked by pid {culprit}"


def test_a_database_that_accepts_and_says_nothing_is_given_up(
    examine: Callable[..., Examination], proxy: Proxy
):
    proxy.stalled = True
    examination = examine(proxy.dsn)
    assert "did not answer within 2 s" in str(examination.error)
    assert examination.health is None


def test_a_line_that_falls_silent_between_two_looks_is_given_up_and_found_again(
    proxy: Proxy, door: Door
):
    with Checkup(Target(proxy.dsn, "the database", "key"), door, seconds=1.5) as checkup:
        assert checkup.look().error is None
        assert checkup.look().error is None
        assert proxy.accepted == 1
        proxy.stalled = True
        assert all(checkup.look().error is not None for _ in range(2))
        # One more on its own behalf and one for the other database, which is not given up yet.
        assert proxy.accepted == 3
        proxy.stalled = False
        for _ in range(40):
            examination = checkup.look()
            if examination.error is None:
                break
        assert examination.error is None


def test_a_login_that_hangs_is_waited_for_and_not_tried_again(proxy: Proxy, door: Door):
    proxy.stalled = True
    with Checkup(Target(proxy.dsn, "the database", "key"), door, seconds=1.0) as checkup:
        for _ in range(5):
            assert "did not answer within 1 s" in str(checkup.look().error)
        # Its own and the one for the other database.
        assert proxy.accepted == 2
        proxy.stalled = False
        wait_until(lambda: checkup.look().error is None, "the login succeeds")
        assert proxy.accepted == 2


def test_who_comes_again_and_again_takes_time_before_a_door_where_nobody_answers(
    examine: Callable[..., Examination], proxy: Proxy, door: Door, tmp_path: Path
):
    proxy.stalled = True
    assert "did not answer within 2 s" in str(examine(proxy.dsn, sparing=True).error)
    assert "did not answer within 2 s" in str(examine(proxy.dsn, sparing=True).error)
    knocked = proxy.accepted
    examination = examine(proxy.dsn, sparing=True)
    assert "left in peace" in str(examination.error)
    assert "helena status, without options" in str(examination.error and examination.error.remedy)
    assert proxy.accepted == knocked
    # A person is not kept waiting.
    assert "did not answer within 2 s" in str(examine(proxy.dsn).error)
    assert proxy.accepted > knocked
    # And nobody for longer than it was barred so far.
    path = tmp_path / "barred"
    os.utime(path, (0, time.time() - 2 * door.pause()))
    proxy.stalled = False
    assert examine(proxy.dsn, sparing=True).error is None
    assert not door.barred


def test_a_pooler_in_transaction_mode_is_no_obstacle(pgbouncer: str, door: Door):
    with Checkup(Target(pgbouncer, "the database", "key"), door) as checkup:
        for _ in range(2):
            examination = checkup.look()
            assert examination.error is None
            assert dict(found(examination).unknown) == {}
            assert found(examination).prepared is False
    with session(pgbouncer) as connection:
        # Nothing of the look stays in the session, which others get next.
        for setting in ("statement_timeout", "lock_timeout"):
            assert connection.execute(f"SHOW {setting}".encode()).fetchone() == ("0",)
        assert connection.execute("SHOW transaction_read_only").fetchone() == ("off",)


def test_a_server_that_is_away_is_an_error_with_its_remedy(examine: Callable[..., Examination]):
    examination = examine("host=127.0.0.1 port=1 dbname=x user=y")
    assert "No server listens there" in str(examination.error and examination.error.remedy)
    assert not examination.slots_taken


def test_a_role_that_may_not_enter_the_other_database_still_gets_an_answer(
    examine: Callable[..., Examination], helena_dsn: str, outside: Session
):
    role = f"helena_shut_{os.getpid()}"
    outside.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
    outside.execute("REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
    try:
        with holding(helena_dsn, "LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE") as culprit:
            examination = examine(make_conninfo(helena_dsn, user=role, password="x"))
        # From template1.
        assert f"locked by pid {culprit}" in str(examination.error)
    finally:
        outside.execute("GRANT CONNECT ON DATABASE postgres TO PUBLIC")
        outside.execute(f"DROP ROLE {role}".encode())


def test_a_lost_database_name_only_costs_the_look_from_elsewhere(tmp_path: Path):
    service = tmp_path / "pg_service.conf"
    service.write_text("[somewhere]\nhost=127.0.0.1\nport=1\n")
    assert database_name(Target("service=somewhere", "", "")) is None
    assert database_name(Target("service=somewhere dbname=x", "", "")) == "x"
    assert database_name(Target("postgresql://u@h/d", "", "")) == "d"
    assert database_name(Target("postgresql://u@h", "", "")) == "u"
    with Checkup(Target("service=somewhere", "x", ""), Door(tmp_path / "barred")) as checkup:
        assert checkup.look().error is not None


def test_taken_slots_are_recognised_on_every_release(
    examine: Callable[..., Examination], outside: Session, helena_dsn: str, postgres15: str
):
    for server in (helena_dsn, postgres15):
        with session(make_conninfo(server, dbname="postgres")) as admin:
            role = f"helena_none_{os.getpid()}"
            admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0".encode())
            examination = examine(make_conninfo(server, user=role))
            admin.execute(f"DROP ROLE {role}".encode())
        assert examination.slots_taken
