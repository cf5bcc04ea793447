"""The plan to free a database: the smallest action, who is freed by it, and who is left alone."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helena_cli.database.blocking import Awaited, Key, Look, Session, behind, freed, roots
from helena_cli.database.relief import Plan, Scope, follow_up, make_plan

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
READ = Awaited("relation", "AccessShareLock", "goods")
ALTER = Awaited("relation", "AccessExclusiveLock", "goods")
ROW = Awaited("transactionid", "ShareLock", "a row")
ADVISORY = Awaited("advisory", "ExclusiveLock", "a number")


def session(pid: int, *blockers: Key, **more: Any) -> Session:
    """A session that idles in a transaction; or waits, when it has blockers."""
    waits: dict[str, Any] = {"state": "idle in transaction"}
    if blockers:
        waits = {"state": "active", "awaits": READ}
    known: dict[str, Any] = {
        "user": "me",
        "backend_type": "client backend",
        "may_end": True,
        "seconds": 60.0,
    }
    times = dict.fromkeys(
        ("backend_start", "xact_start", "query_start", "state_change"),
        MOMENT + timedelta(seconds=pid),
    )
    return Session(pid=pid, blockers=frozenset(blockers), **(known | times | waits | more))


def plan(*sessions: Session, **scope: Any) -> Plan:
    return make_plan(Look.of(sessions), Scope(**scope))


def deeds(found: Plan) -> list[tuple[Key, str, int]]:
    return [(a.session.key, a.deed, a.frees) for a in found.actions]


def spared(found: Plan) -> dict[Key, str]:
    return {one.session.key: one.reason for one in found.spared}


def readers(*blockers: int) -> list[Session]:
    return [session(pid, *blockers) for pid in range(100, 120)]


@pytest.mark.parametrize(
    ("root", "deed"),
    [
        ({"state": "idle in transaction"}, "terminate"),
        ({"state": "idle in transaction (aborted)"}, "terminate"),
        ({"state": "active"}, "cancel"),
        ({"state": "fastpath function call"}, "cancel"),
        ({"state": "disabled"}, "cancel"),
        ({"state": "idle"}, "terminate"),
    ],
)
def test_the_smallest_action_depends_on_what_the_root_does(root: dict[str, Any], deed: str):
    assert deeds(plan(session(1, **root), session(2, 1))) == [(1, deed, 1)]


def test_a_queued_statement_goes_when_that_frees_all_others():
    found = plan(session(1), session(2, 1, awaits=ALTER), *readers(2))
    assert deeds(found) == [(2, "cancel", 20)]


def test_the_root_goes_when_the_others_wait_for_it_as_well():
    found = plan(session(1), session(2, 1, awaits=ALTER), *readers(1, 2))
    assert deeds(found) == [(1, "terminate", 21)]


def test_a_queued_statement_that_nobody_waits_for_gets_its_turn():
    assert deeds(plan(session(1), session(2, 1, awaits=ALTER))) == [(1, "terminate", 1)]


def test_of_several_queued_statements_only_those_go_that_are_in_the_way():
    queue = [session(2, 1, awaits=ALTER), session(3, 1, 2, awaits=ALTER)]
    found = plan(session(1), *queue, *readers(2, 3))
    assert [key for key, _, _ in deeds(found)] == [2, 3]
    assert sum(frees for _, _, frees in deeds(found)) == 20
    behind_the_first = plan(session(1), *queue, *readers(2))
    assert deeds(behind_the_first) == [(2, "cancel", 20)]


def test_a_chain_is_freed_from_its_root():
    chain = [session(1), session(2, 1, awaits=ROW), session(3, 2, awaits=ROW)]
    assert deeds(plan(*chain)) == [(1, "terminate", 2)]


def test_each_of_two_roots_frees_what_the_other_does_not_hold():
    found = plan(session(1), session(2), session(3, 1), session(4, 1, 2), session(5, 2))
    assert deeds(found) == [(1, "terminate", 1), (2, "terminate", 2)]


def test_a_parallel_worker_counts_as_the_session_that_it_works_for():
    leader = session(1, state="active")
    worker = session(7, 2, leader=1, backend_type="parallel worker")
    found = plan(leader, worker, session(2))
    assert found.edges == {1: frozenset({2})}
    assert deeds(found) == [(2, "terminate", 1)]


def test_a_prepared_transaction_is_rolled_back():
    prepared = Session(pid=None, gid="g", user="me", state="prepared", may_end=True)
    assert deeds(plan(prepared, session(1, "g"))) == [("g", "rollback prepared", 1)]


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ({"here": False, "database": "other"}, "belongs to other"),
        ({"backend_type": "autovacuum worker", "may_end": False}, "server's own: autovacuum"),
        ({"backend_type": "walsender"}, "server's own: walsender"),
        ({"backend_type": "parallel worker"}, "server's own: parallel"),
        ({"backend_type": None}, "may not see"),
        ({"may_end": False}, "may not end what belongs to me"),
        ({"may_end": False, "superuser": True}, "superuser"),
        ({"state": "active", "vacuum": True}, "VACUUM"),
    ],
)
def test_some_sessions_are_never_ended(root: dict[str, Any], reason: str):
    everything = {"everything": True, "older_than": 0.0}
    for scope in ({}, everything, {"pids": frozenset({1})}):
        found = plan(session(1, **root), session(2, 1, state="active"), **scope)
        assert all(action.session.key != 1 for action in found.actions)
        assert reason in spared(found)[1]
        assert found.blocked == 1


@pytest.mark.parametrize(
    ("superuser", "who"), [(False, "let me or a superuser run"), (True, "let a superuser run")]
)
def test_who_may_end_a_session_is_told_to_a_role_that_may_not(superuser: bool, who: str):
    found = plan(session(1, may_end=False, superuser=superuser), session(2, 1, state="active"))
    (one,) = found.spared
    assert f"{who}: SELECT pg_terminate_backend(1);" in one.remedy


def test_behind_one_that_must_stay_a_queued_statement_is_cancelled_for_the_others():
    found = plan(session(1, may_end=False), session(2, 1, awaits=ALTER), *readers(2))
    assert deeds(found) == [(2, "cancel", 20)]


def test_a_vacuum_full_that_only_waits_has_done_nothing_yet():
    found = plan(session(1), session(2, 1, awaits=ALTER, vacuum=True), *readers(2))
    assert deeds(found) == [(2, "cancel", 20)]


def test_helena_itself_goes_only_from_the_root():
    found = plan(session(1), session(2, 1, awaits=ALTER, application="helena init"), *readers(2))
    assert deeds(found) == [(1, "terminate", 21)]
    idle = session(3, application="helena flush")
    assert deeds(plan(idle, session(4, 3))) == [(3, "terminate", 1)]
    assert deeds(plan(idle, everything=True, older_than=0.0)) == []


def test_advisory_locks_are_held_on_purpose_but_not_by_who_idles_in_a_transaction():
    for state, found in (("idle", []), ("active", []), ("idle in transaction", [1])):
        made = plan(session(1, state=state), session(2, 1, awaits=ADVISORY))
        assert [a.session.key for a in made.actions] == found
        assert made.blocked == len(found)
    named = plan(session(1, state="idle"), session(2, 1, awaits=ADVISORY), pids=frozenset({1}))
    assert deeds(named) == [(1, "terminate", 1)]


@pytest.mark.parametrize(
    "scope",
    [
        {"users": frozenset({"you"})},
        {"pids": frozenset({3})},
        {"older_than": 61.0},
        {"relations": frozenset({5})},
    ],
)
def test_a_root_that_the_options_leave_out_is_left_alone_and_still_blocks(scope: dict[str, Any]):
    found = plan(session(1, relations=frozenset({4})), session(2, 1), **scope)
    assert found.actions == ()
    assert "options" in spared(found)[1]
    assert found.blocked == 1


def test_a_named_session_goes_even_if_it_blocks_nobody():
    sessions = [session(1), session(2, state="active"), session(3, state="idle")]
    found = plan(*sessions, pids=frozenset({1, 2, 3, 4}))
    assert deeds(found) == [(1, "terminate", 0), (2, "cancel", 0)]
    assert "does nothing" in spared(found)[3]
    assert "no such session" in spared(found)[4]


def test_all_is_for_those_that_have_been_so_for_five_minutes_or_as_long_as_asked():
    sessions = [
        session(1, seconds=301.0),
        session(2, seconds=299.0),
        session(3, seconds=301.0, state="active"),
        session(4, seconds=9999.0, state="idle"),
        session(5, seconds=9999.0, state="active", backend_type="walsender"),
    ]
    assert deeds(plan(*sessions)) == []
    assert [key for key, _, _ in deeds(plan(*sessions, everything=True))] == [1, 3]
    asked = plan(*sessions, everything=True, older_than=10.0)
    assert [key for key, _, _ in deeds(asked)] == [1, 2, 3]


def test_the_tables_concerned_are_those_of_the_ended_and_of_the_freed():
    found = plan(
        session(1, written=frozenset({10}), relations=frozenset({10, 11})),
        session(2, 1, written=frozenset({12})),
        session(3, written=frozenset({13})),
    )
    assert found.relations == {10, 12}


# What lasts


def test_a_wait_that_is_over_in_the_second_look_was_no_blockade():
    first = Look.of([session(1), session(2, 1), session(3, 1)])
    later = session(3, 1, query_start=MOMENT)
    second = Look.of([session(1), session(2, 1), later, session(4, 1)])
    assert second.lasting(first).edges() == {2: frozenset({1})}


def test_taking_turns_is_no_blockade():
    waits = session(3, 1, 2)
    first = Look.of([session(1), session(2), waits])
    another = session(2, xact_start=MOMENT)
    assert Look.of([session(1), another, waits]).lasting(first).edges() == {3: frozenset({1})}
    assert Look.of([another, session(3, 2)]).lasting(first).edges() == {}


def test_a_wait_for_somebody_who_has_ended_meanwhile_does_not_count():
    assert Look.of([session(2, 1)]).edges() == {}


# The rounds after the first


def test_who_was_freed_gets_time_unless_it_idles_itself():
    first = plan(session(1), session(2, 1), session(3, 2))
    works = plan(session(2, state="active"), session(3, 2))
    found = follow_up(works, first.actions, ())
    assert deeds(found) == []
    assert "at work" in spared(found)[2]
    idles = plan(session(2, seconds=11.0), session(3, 2))
    assert deeds(follow_up(idles, first.actions, ())) == [(2, "terminate", 1)]
    thinks = follow_up(plan(session(2, seconds=5.0), session(3, 2)), first.actions, ())
    assert deeds(thinks) == []
    assert "about to commit" in spared(thinks)[2]
    assert "type again: helena clear-locks" in thinks.spared[0].remedy


@pytest.mark.parametrize(("minutes", "ended"), [(4, []), (6, [(2, "terminate", 1)])])
def test_an_old_transaction_that_was_freed_and_idles_gets_no_more_time(minutes: int, ended: Any):
    first = plan(session(1), session(2, 1), session(3, 2))
    old = session(
        2, seconds=1.0, xact_start=MOMENT, state_change=MOMENT + timedelta(0, minutes * 60)
    )
    assert deeds(follow_up(plan(old, session(3, 2)), first.actions, ())) == ended


def test_who_was_cancelled_in_vain_is_terminated():
    first = plan(session(1, state="active"), session(2, 1))
    again = plan(session(1, state="active", seconds=0.1), session(2, 1))
    assert deeds(follow_up(again, first.actions, {1})) == [(1, "terminate", 1)]
    assert deeds(follow_up(again, first.actions, ())) == [(1, "cancel", 1)]


def test_another_transaction_under_the_same_pid_is_not_who_was_cancelled():
    first = plan(session(1, state="active"), session(2, 1))
    other = plan(session(1, state="active", backend_start=MOMENT), session(2, 1))
    assert deeds(follow_up(other, first.actions, {1})) == []


# Any graph at all

graphs = st.dictionaries(
    st.integers(1, 8), st.frozensets(st.integers(1, 12), min_size=1, max_size=3), max_size=8
).map(lambda edges: {key: blockers - {key} for key, blockers in edges.items() if blockers - {key}})


@given(graphs)
def test_with_all_roots_gone_everybody_is_free_but_circles_and_who_waits_for_them(
    edges: dict[Key, frozenset[Key]],
):
    gone = roots(edges)
    free = freed(edges, gone)
    assert not free & set(gone)
    for key in edges.keys() - free:
        # It waits for somebody who is not free either.
        assert edges[key] - free - set(gone)
    assert free <= frozenset().union(*(behind(edges, root) for root in gone))


@given(graphs)
def test_a_plan_for_any_graph_ends_nobody_in_vain(edges: dict[Key, frozenset[Key]]):
    keys = set(edges) | {key for blockers in edges.values() for key in blockers}
    sessions = [session(int(key), *edges.get(key, ())) for key in sorted(keys, key=int)]
    found = plan(*sessions)
    gone = {action.session.key for action in found.actions}
    assert len(gone) == len(found.actions)
    assert sum(action.frees for action in found.actions) == len(freed(edges, gone))
    assert all(freed(edges, gone - {key}) < freed(edges, gone) | gone for key in gone)
