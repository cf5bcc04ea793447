"""Operations that are written straight from the inbox keep every promise of the longer way."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from typing import Any

import pytest

from helena_cli.batch.cycle import Policy
from helena_cli.batch.flush import Outcome
from helena_cli.batch.inbox import Inbox
from helena_cli.batch.operation import Operation
from helena_cli.batch.spool import Spool
from helena_cli.errors import SpoolError
from tests.hosts import Host
from tests.integration.test_engine import Relay, make_cycle, path_of_parts
from tests.spools import Clock, assert_law

pytestmark = pytest.mark.postgres

#: No interval that a test lives to see, and no size that it reaches.
ONLY_WHEN_ASKED = Policy(interval=3600.0, size=5000)


class Killed(BaseException):
    """What ends a flusher at once."""


class KilledAfterCommit(Relay):
    """The database has it, and the spool never learns of that."""

    def write(self, *given: Any, **named: Any) -> Outcome:
        super().__getattr__("write")(*given, **named)
        raise Killed


class BlindAhead(Relay):
    """Its reading ahead fails; nothing depends on it."""

    def read_ahead(self, operations: Iterable[Operation]) -> Any:
        raise SpoolError("The queue did not answer.", remedy="None.")


def number(n: int, table: str = "numbers") -> tuple[str, str, dict[str, Any]]:
    return "insert", table, {"n": n}


def test_a_held_operation_blocks_its_key_by_whatever_name_its_table_is_called(host: Host):
    host.sql("CREATE TABLE parent (k int PRIMARY KEY)")
    host.sql("CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES parent, v text)")
    with closing(Spool.open(path_of_parts(host))) as spool:
        cycle, writer = make_cycle(host, spool)
        with closing(cycle), closing(writer):
            spool.append("insert", "child", {"id": 1, "p": 7, "v": "first"})
            assert cycle.turn(force=True)
            spool.append("insert", "public.child", {"id": 1, "p": None, "v": "second"})
            cycle.turn(force=True)
            spool.append("insert", "parent", {"k": 7})
            while spool.queue().total:
                cycle.turn(force=True)
                waiting = [*spool.queued("child"), *spool.queued("public.child")]
                spool.release_held(operation.id for operation in waiting)
            assert_law(spool)
    assert host.sql("SELECT v FROM child") == [("second",)]


def test_an_id_that_the_database_has_is_never_given_out_again(host: Host):
    """Not even when the inbox went with a power cut and the clock with it: it would be skipped."""
    clock, path = Clock(time.time()), path_of_parts(host)
    with closing(Spool.open(path, clock=clock)) as spool:
        cycle, writer = make_cycle(host, spool, wrap=KilledAfterCommit, clock=clock)
        with closing(cycle), closing(writer):
            used = spool.append(*number(0))
            with suppress(Killed):
                cycle.turn(force=True)
        os.unlink(f"{path}.inbox")
    clock.now -= 3600
    with closing(Spool.open(path, clock=clock)) as spool:
        cycle, writer = make_cycle(host, spool, clock=clock)
        with closing(cycle), closing(writer):
            assert spool.append(*number(1)) > used
            assert cycle.turn(force=True)
            assert_law(spool)
    assert host.numbers() == [0, 1]


def test_a_request_to_flush_is_not_taken_back_by_an_older_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    path = path_of_parts(host)
    with closing(Spool.open(path)) as spool, closing(Spool.open(path)) as other:
        cycle, writer = make_cycle(host, spool, policy=ONLY_WHEN_ASKED)
        with closing(cycle), closing(writer):
            spool.append(*number(0))
            transact = other._file.transact

            def late(*given: Any, **named: Any) -> Any:
                # Others are faster than the one that asks.
                cycle.turn(force=True)
                spool.append(*number(1))
                spool.request_flush()
                return transact(*given, **named)

            monkeypatch.setattr(other._file, "transact", late)
            other.request_flush()
            cycle.turn()
            assert host.numbers() == [0, 1]


def test_a_hundred_operations_are_due_wherever_they_wait(host: Host):
    """Also after a statement that took too long, when few are tried at once."""
    with closing(Spool.open(path_of_parts(host))) as spool:
        cycle, writer = make_cycle(host, spool, policy=Policy(interval=3600.0))
        with closing(cycle), closing(writer):
            cycle._limit = 1
            spool.append(*number(0))
            spool.fold()
            spool.extend(number(n) for n in range(1, 150))
            assert cycle.turn()


def test_what_fails_in_reading_ahead_fails_no_flush(host: Host):
    with closing(Spool.open(path_of_parts(host))) as spool:
        cycle, writer = make_cycle(host, spool, wrap=BlindAhead, policy=Policy(max_size=10))
        with closing(cycle), closing(writer):
            spool.extend(number(n) for n in range(30))
            while cycle.turn(force=True):
                pass
    assert host.numbers() == list(range(30))


def fold(spool: Spool) -> None:
    spool.fold()


def bury_and_retry(spool: Spool) -> None:
    """Other operations of the same lane come into the tables, behind what is in the inbox."""
    spool.accept_file("/f", "d", [number(n) for n in range(40, 50)])


def refill(spool: Spool) -> None:
    """The inbox begins anew with records just as long as the ones that were there."""
    spool.fold()
    spool.extend(number(n) for n in range(40, 50))


@pytest.mark.parametrize("meddle", [fold, bury_and_retry, refill])
def test_who_looks_into_the_spool_in_the_middle_of_a_flush_changes_nothing(
    host: Host, meddle: Callable[[Spool], None]
):
    path = path_of_parts(host)
    done: list[int] = []

    class Meddling(Relay):
        def write(self, *given: Any, **named: Any) -> Outcome:
            outcome: Outcome = super().__getattr__("write")(*given, **named)
            if not done:
                done.append(1)
                with closing(Spool.open(path)) as other:
                    meddle(other)
            return outcome

    with closing(Spool.open(path)) as spool:
        cycle, writer = make_cycle(host, spool, wrap=Meddling, policy=Policy(max_size=10))
        with closing(cycle), closing(writer):
            spool.extend(number(n) for n in range(40))
            while spool.queue().total:
                assert cycle.turn(force=True)
                assert_law(spool)
            total = spool.conservation().written
    assert host.numbers() == list(range(total))


def test_a_flusher_that_died_before_it_released_the_inbox_holds_up_no_other(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    def die(*_: object) -> None:
        raise Killed

    with closing(Spool.open(path_of_parts(host))) as spool:
        cycle, writer = make_cycle(host, spool)
        with closing(cycle), closing(writer):
            spool.append(*number(0))
            with monkeypatch.context() as patch, suppress(Killed):
                patch.setattr(Inbox, "release", die)
                cycle.turn(force=True)
            spool.append(*number(1))
            cycle.turn(force=True)
            # Nobody has looked, which would fold what was left behind.
            assert spool.is_settled(spool.request_flush())
            assert_law(spool)
    assert host.numbers() == [0, 1]


def test_a_flusher_that_died_after_its_commit_has_written_once(host: Host):
    with closing(Spool.open(path_of_parts(host))) as spool:
        cycle, writer = make_cycle(host, spool, wrap=KilledAfterCommit)
        with closing(cycle), closing(writer):
            spool.extend(number(n) for n in range(20))
            with suppress(Killed):
                cycle.turn(force=True)
        cycle, writer = make_cycle(host, spool)
        with closing(cycle), closing(writer):
            spool.append(*number(20))
            assert cycle.turn(force=True)
            assert_law(spool)
            assert spool.conservation().written == 21
    assert host.numbers() == list(range(21))
