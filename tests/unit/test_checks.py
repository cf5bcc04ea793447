"""The checklist: what is judged ok, warn, critical or unknown."""

import msgspec
import pytest

from helena_cli.batch.ledger import Flusher, Flushes, FlushRecord, Lane, Queue
from helena_cli.cli.checks import Check, Observed, judge
from helena_cli.database.health import Connections, GinIndex, Health, Holder, Session
from helena_cli.errors import DatabaseUnreachable
from helena_cli.settings import CheckSettings

NOW = 1_000_000.0
EMPTY = Queue(0, 0, 0, 0, None, 0, 0)
IDLE = Flushes(0, 0, 0, 0, None, None, None, None)
HEALTHY = Health(
    server_version="18.0",
    prepared=True,
    response_ms=0.2,
    active_queries=0,
    longest_query_seconds=0.0,
    lock_waits=0,
    idle_in_transaction=0,
    connections=Connections(10, 97, 2),
    gin=(),
    hosts=(),
    unknown={},
)
QUIET = Observed(EMPTY, [], IDLE, None, False, HEALTHY, NOW)


def waiting(seconds: float) -> Queue:
    return Queue(1, 0, 0, 1, seconds, 0, 100)


def check(name: str, **changes: object) -> Check:
    seen = msgspec.structs.replace(QUIET, **changes)
    return next(one for one in judge(seen) if one.name == name)


def healthy_but(**changes: object) -> Health:
    return msgspec.structs.replace(HEALTHY, **changes)


def test_every_promised_check_is_there_whether_the_database_answers_or_not():
    names = {
        *("queue_age", "dead_letters", "flusher", "throughput", "response_time", "pool"),
        *("longest_query", "gin_pending"),
    }
    for health in (HEALTHY, None):
        checks = judge(msgspec.structs.replace(QUIET, health=health))
        assert {one.name for one in checks} == names
        assert len(checks) == len(names)


def test_a_quiet_host_has_nothing_to_complain_about():
    assert {one.status for one in judge(QUIET)} == {"ok", "unknown"}


def test_a_complaint_always_says_what_to_do():
    ill = Observed(
        waiting(1000),
        [],
        Flushes(9, 9000, 9000, 3, 100.0, 5.0, 9.0, FlushRecord(NOW, 0, 0, 1.0, "no")),
        Flusher(7, "h", 0.0, NOW - 100),
        True,
        healthy_but(
            response_ms=500.0,
            longest_query_seconds=431.0,
            connections=Connections(97, 97, 2),
            gin=(GinIndex("i", "t", 600, 512),),
        ),
        NOW,
    )
    complaints = [one for one in judge(ill) if one.status in {"warn", "critical"}]
    assert len(complaints) == 7
    assert all(one.remedy for one in complaints)


@pytest.mark.parametrize(
    ("seconds", "status"), [(1, "ok"), (30, "ok"), (31, "warn"), (60, "warn"), (61, "critical")]
)
def test_the_queue_grows_old(seconds: float, status: str):
    assert check("queue_age", queue=waiting(seconds)).status == status


def test_an_old_queue_points_at_the_tables_that_wait():
    lane = Lane("nowhere", 1, "it is missing", "42P01", "create it", 0.0, 0.0, 3)
    assert "nowhere" in str(check("queue_age", queue=waiting(99), lanes=[lane]).remedy)
    assert "process-pending" in str(check("queue_age", queue=waiting(99)).remedy)


def test_dead_letters_are_a_warning():
    assert check("dead_letters").status == "ok"
    found = check("dead_letters", queue=Queue(0, 0, 0, 0, None, 2, 100))
    assert (found.status, found.value) == ("warn", 2)


def test_a_flusher_is_missed_only_when_something_waits():
    assert check("flusher").status == "ok"
    assert check("flusher", queue=waiting(1)).status == "warn"


@pytest.mark.parametrize(("silence", "status"), [(5, "ok"), (60, "ok"), (61, "critical")])
def test_a_flusher_without_a_sign_of_life_is_critical(silence: float, status: str):
    flusher = Flusher(7, "h", 0.0, NOW - silence)
    assert check("flusher", flusher=flusher, flusher_running=True).status == status


def test_a_flusher_that_fails_is_a_warning_with_the_reason():
    failed = msgspec.structs.replace(IDLE, last=FlushRecord(NOW, 0, 0, 0.1, "no disk"))
    flusher = Flusher(7, "h", 0.0, NOW)
    found = check("flusher", flusher=flusher, flusher_running=True, flushes=failed)
    assert found.status == "warn"
    assert "no disk" in found.message


@pytest.mark.parametrize(
    ("count", "operations", "rate", "status"),
    [(10, 1000, 501.0, "ok"), (10, 1000, 499.0, "warn"), (10, 999, 499.0, "unknown")],
)
def test_throughput_is_judged_only_under_load(
    count: int, operations: int, rate: float, status: str
):
    flushes = Flushes(count, operations, operations, 0, rate, 1.0, 1.0, None)
    assert check("throughput", flushes=flushes).status == status


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("response_time", "response_ms", (50.0, 51.0, 101.0)),
        ("longest_query", "longest_query_seconds", (5.0, 6.0, 11.0)),
    ],
)
def test_a_slow_database_is_noticed(name: str, field: str, values: tuple[float, ...]):
    found = [check(name, health=healthy_but(**{field: value})).status for value in values]
    assert found == ["ok", "warn", "critical"]


@pytest.mark.parametrize(("used", "status"), [(79, "ok"), (80, "warn"), (95, "critical")])
def test_the_connections_run_out(used: int, status: str):
    assert check("pool", health=healthy_but(connections=Connections(used, 100, 0))).status == status


@pytest.mark.parametrize(("pages", "status"), [(256, "ok"), (257, "warn"), (513, "critical")])
def test_the_worst_pending_list_decides(pages: int, status: str):
    gin = (GinIndex("a", "t", 0, 512), GinIndex("b", "t", pages, 512), GinIndex("c", "t", None, 9))
    found = check("gin_pending", health=healthy_but(gin=gin))
    assert (found.status, found.value, found.limit) == (status, pages, 512)


def test_what_could_not_be_read_is_unknown_and_never_zero():
    blind = healthy_but(
        response_ms=None,
        longest_query_seconds=None,
        connections=Connections(),
        gin=(GinIndex("a", "t", None, 512, "locked by another session"),),
        unknown={"active_queries": "not allowed"},
    )
    for name in ("response_time", "longest_query", "pool", "gin_pending"):
        found = check(name, health=blind)
        assert (found.status, found.value) == ("unknown", None)
    assert check("longest_query", health=blind).message == "not allowed"
    assert check("gin_pending", health=blind).message == "locked by another session"


def test_a_database_that_is_away_is_critical():
    assert check("response_time", health=None).status == "critical"


# The limits are those of the settings


@pytest.mark.parametrize(
    ("name", "limit", "changes"),
    [
        ("queue_age", {"queue_age_seconds": 5.0}, {"queue": waiting(6)}),
        ("response_time", {"response_ms": 1.0}, {"health": healthy_but(response_ms=2.0)}),
        (
            "longest_query",
            {"longest_query_seconds": 1.0},
            {"health": healthy_but(longest_query_seconds=2.0)},
        ),
        (
            "throughput",
            {"operations_per_second": 9000.0},
            {"flushes": Flushes(1, 1000, 1000, 0, 8000.0, 1.0, 1.0, None)},
        ),
    ],
)
def test_every_limit_can_be_set(name: str, limit: dict[str, float], changes: dict[str, object]):
    seen = msgspec.structs.replace(QUIET, **changes)

    def judged(limits: CheckSettings) -> Check:
        return next(one for one in judge(seen, limits) if one.name == name)

    assert judged(CheckSettings()).status == "ok"
    strict = judged(CheckSettings(**limit))
    assert strict.status in {"warn", "critical"}
    assert strict.limit in limit.values()


# Who and what to do


def session(pid: int, seconds: float, *blocked_by: int) -> Session:
    return Session(pid, "u", "a", "active", seconds, "SELECT 1", blocked_by=blocked_by)


def test_a_long_query_that_waits_is_reported_with_whom_it_waits_for():
    query = session(7, 60.0, 4711, 0)
    health = healthy_but(longest_query_seconds=60.0, longest_query=query, waiting=(query,))
    found = check("longest_query", health=health)
    assert "pid 7 has waited 1 min for pid 4711 and a prepared transaction" in found.message
    assert "clear-locks" in str(found.remedy)


def test_a_long_wait_is_seen_by_a_role_that_sees_no_query():
    blind = healthy_but(longest_query_seconds=None, unknown={"active_queries": "not allowed"})
    for seconds, status in ((9.0, "unknown"), (11.0, "critical")):
        health = msgspec.structs.replace(blind, waiting=(session(7, seconds, 4711),))
        assert check("longest_query", health=health).status == status


@pytest.mark.parametrize(
    ("connections", "message"),
    [
        (Connections(50, 100, 0, role_used=8, role_max=10), "8 of 10 connections of this role"),
        (Connections(50, 100, 0, database_used=5, database_max=5), "5 of 5 connections of this da"),
        (Connections(90, 100, 0, 1, 10, 1, 5), "90 of 100 connections in use"),
        (Connections(1, 100, 0, role_used=0, role_max=0), "0 of 0 connections of this role"),
    ],
)
def test_the_limit_that_is_nearest_decides(connections: Connections, message: str):
    holders = (Holder("etl", "psql", 40), Holder("web", "", 9))
    found = check("pool", health=healthy_but(connections=connections, holders=holders))
    assert message in found.message
    if found.status != "ok":
        assert "40 by etl (psql), 9 by web" in str(found.remedy)


def test_taken_slots_are_critical_without_a_database():
    away = DatabaseUnreachable("no", remedy="wait")
    found = check("pool", health=None, away=away, slots_taken=True)
    assert (found.status, bool(found.remedy)) == ("critical", True)
    assert check("response_time", health=None, away=away).remedy == "wait"


def test_what_another_database_tells_is_judged_and_the_rest_is_unknown():
    seen = msgspec.structs.replace(
        QUIET, health=healthy_but(via="postgres"), away=DatabaseUnreachable("no", remedy="wait")
    )
    found = {one.name: one.status for one in judge(seen)}
    assert (found["response_time"], found["gin_pending"]) == ("critical", "unknown")
    assert (found["pool"], found["longest_query"]) == ("ok", "ok")


def test_lists_that_could_not_be_read_are_counted():
    gin = (GinIndex("a", "t", 1, 512), GinIndex("b", "t", None, 512, "locked by pid 7"))
    assert "1 could not be read" in check("gin_pending", health=healthy_but(gin=gin)).message


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("the extension pgstattuple is not installed", "CREATE EXTENSION pgstattuple"),
        ("permission denied for function pgstatginindex: needs pg_monitor", "GRANT pg_monitor"),
    ],
)
def test_an_unknown_pending_list_says_what_would_help(reason: str, cure: str):
    health = healthy_but(gin=(GinIndex("a", "t", None, 512, reason),))
    found = check("gin_pending", health=health)
    assert found.status == "unknown"
    assert cure in str(found.remedy)
