"""What the flusher does with each answer of a writer. The writer here only gives the answers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from helena_cli.batch import fold
from helena_cli.batch.cycle import Cycle, Policy
from helena_cli.batch.flush import Batch, FlushFailed, Outcome, Waiting
from helena_cli.batch.operation import Operation
from helena_cli.batch.reading import Reading
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import SpoolUnavailable

Answer = Callable[[Batch, Callable[[Operation, str], bool]], Outcome]


class ScriptedWriter:
    """Answers each write with the next answer of its script; the last one is repeated."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.batches: list[Batch] = []
        self.ahead: list[int] = []
        #: How many of the next answers to COMMIT get lost.
        self.lost_answers = 0

    def write(
        self,
        batch: Batch,
        *,
        hold: Callable[[Operation, str], bool],
        seal: Callable[[Outcome], None],
        busy: Callable[[], None],
    ) -> Outcome:
        self.batches.append(batch)
        busy()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        outcome = answer(batch, hold)
        seal(outcome)
        if self.lost_answers:
            self.lost_answers -= 1
            raise FlushFailed("connection lost")
        return outcome

    def read_ahead(self, operations: Iterable[Operation]) -> dict[str, Reading]:
        """Nothing that a batch would need."""
        self.ahead += [operation.id for operation in operations]
        return {}

    def maintain(self, tables: frozenset[str]) -> None:
        """Nothing to maintain."""

    def close(self) -> None:
        """Nothing to close."""


def write_all(batch: Batch, _: object) -> Outcome:
    due = [operation for operation in batch.operations if operation.due]
    tables = frozenset(operation.table for operation in due)
    ids = tuple(operation.id for operation in due)
    return Outcome("target", written=ids, settled_tables=tables, rows=len(ids))


def fail(**kind: Any) -> Answer:
    def answer(batch: Batch, _: object) -> Outcome:
        raise FlushFailed("no answer", **kind)

    return answer


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(state_dir: Path, clock: Clock) -> Iterator[Spool]:
    spool = Spool.open(state_dir / "test.spool", clock=clock)
    yield spool
    law = spool.conservation()
    assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled
    spool.close()


MakeCycle = Callable[..., tuple[Cycle, ScriptedWriter]]


@pytest.fixture
def make_cycle(spool: Spool, clock: Clock) -> Iterator[MakeCycle]:
    with ExitStack() as stack:

        def make(*answers: Answer, **policy: int) -> tuple[Cycle, ScriptedWriter]:
            writer = ScriptedWriter(*answers)
            cycle = Cycle(spool, writer, Policy(**policy), clock=clock)
            stack.callback(cycle.close)
            return cycle, writer

        yield make


def add(spool: Spool, count: int = 1, table: str = "notes") -> list[int]:
    return spool.extend(("insert", table, {"id": n}) for n in range(count))


def test_nothing_is_flushed_before_the_interval_or_the_size(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(write_all)
    add(spool, 99)
    clock.now += 4.9
    assert not cycle.turn()
    assert not writer.batches


def test_the_hundredth_operation_is_flushed_at_once(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(write_all)
    add(spool, 100)
    assert cycle.turn()
    assert len(writer.batches[0].operations) == 100
    assert spool.conservation().written == 100


def test_a_single_operation_is_flushed_after_the_interval(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(write_all)
    add(spool)
    clock.now += 5.0
    assert cycle.turn()
    assert spool.queue().total == 0


def test_an_operation_stays_in_the_spool_while_flushes_fail(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(fail())
    add(spool, 100)
    for _ in range(20):
        cycle.turn()
        clock.now += 100
    assert spool.queue().total == 100
    assert cycle.failure is not None
    assert cycle.failure.count == 20
    assert spool.flushes().failures == 20


def test_after_a_failure_the_next_try_waits_for_its_time(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(fail())
    add(spool, 100)
    cycle.turn()
    cycle.turn()
    assert len(writer.batches) == 1


def test_a_statement_that_takes_too_long_is_tried_again_with_half(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(fail(halve=True, sqlstate="57014"), write_all)
    add(spool, 100)
    cycle.turn()
    clock.now += 100
    cycle.turn()
    assert [len(batch.operations) for batch in writer.batches] == [100, 50]


def test_one_operation_that_always_takes_too_long_does_not_block_the_rest(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(fail(halve=True, sqlstate="57014"))
    add(spool, 1)
    clock.now += 10
    for _ in range(5):
        cycle.turn()
        clock.now += 100
    (letter,) = spool.dead_letters()
    assert letter.sqlstate == "57014"
    assert spool.queue().total == 0


def test_an_unknown_sqlstate_is_blamed_on_the_row_only_after_some_tries(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(fail(unknown=True, sqlstate="XX123"))
    add(spool, 100)
    for _ in range(6):
        cycle.turn()
        clock.now += 100
    assert [batch.blame_rows for batch in writer.batches] == [False] * 5 + [True]


def test_the_nonce_stays_until_a_commit_is_known(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(write_all)
    writer.lost_answers = 1
    for _ in range(3):
        add(spool, 100)
        clock.now += 100
        cycle.turn()
    first, second, third = writer.batches
    assert first.nonce == second.nonce != third.nonce
    assert second.known_nonces["notes"] == {first.nonce}
    assert third.known_nonces["notes"] == {second.nonce}


def test_a_waiting_lane_does_not_hold_up_the_others(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    def only_notes(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        written = [o.id for o in batch.operations if o.table == "notes"]
        waiting = {"gone": Waiting('relation "gone" does not exist', "42P01")}
        here = {o.table for o in batch.operations}
        return Outcome(
            "target",
            written=tuple(written),
            waiting=waiting if "gone" in here else {},
            settled_tables=frozenset({"notes"} & here),
        )

    cycle, writer = make_cycle(only_notes)
    add(spool, 100), add(spool, 100, "gone")
    cycle.turn()
    add(spool, 100)
    cycle.turn()
    assert {o.table for o in writer.batches[1].operations} == {"notes"}
    assert spool.conservation().written == 200
    (lane,) = spool.lanes()
    assert (lane.table, lane.operations, lane.sqlstate) == ("gone", 100, "42P01")


def test_why_a_lane_waits_is_logged_once_with_its_remedy(
    spool: Spool, clock: Clock, make_cycle: MakeCycle, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = ("not there", "not there", "locked", "locked")
    outcomes = [
        Outcome("target", waiting={"gone": Waiting(reason, remedy="Do it.")}) for reason in reasons
    ]
    cycle, writer = make_cycle(*(lambda *_, outcome=outcome: outcome for outcome in outcomes))
    add(spool, table="gone")
    for _ in reasons:
        clock.now += 100
        cycle.turn()
    assert len(writer.batches) == len(reasons)
    assert caplog.messages == ["gone waits: not there. Do it.", "gone waits: locked. Do it."]


def test_a_waiting_lane_is_probed_alone_and_flows_again(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    wait = Outcome("target", waiting={"gone": Waiting("not there", "42P01")})
    cycle, writer = make_cycle(lambda *_: wait, write_all)
    add(spool, 100, "gone")
    cycle.turn()
    add(spool, 100)
    clock.now += 2
    cycle.turn()
    assert writer.batches[1].probe
    assert {o.table for o in writer.batches[1].operations} == {"gone"}
    assert spool.lanes() == []


def test_a_clock_that_is_set_back_puts_off_neither_a_waiting_lane_nor_a_held_operation(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    wait = Outcome("target", waiting={"gone": Waiting("not there", "42P01")})
    cycle, _ = make_cycle(orphans, lambda *_: wait, write_all)
    add(spool, 100)
    cycle.turn()
    add(spool, 100, "gone")
    cycle.turn()
    assert not cycle.turn()
    clock.now -= 3600
    cycle.turn()
    assert spool.queue().total == 0


def test_after_lane_timeout_the_operations_of_a_lane_are_dead_letters(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    wait = Outcome("target", waiting={"gone": Waiting("not there", "42P01")})
    cycle, _ = make_cycle(lambda *_: wait)
    add(spool, 700, "gone")
    cycle.turn()
    clock.now += 86_401
    cycle.turn()
    letters = spool.dead_letters()
    assert len(letters) == 700
    assert {letter.sqlstate for letter in letters} == {"42P01"}
    assert spool.lanes() == []
    assert cycle.dead == 700


def test_what_died_in_a_flush_whose_commit_is_unknown_counts_once(
    spool: Spool, make_cycle: MakeCycle
) -> None:
    def refuse_first(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        first, *others = batch.operations
        if len(others) < 99:
            return write_all(batch, hold)
        dead = (Verdict(first.id, "22001", "too long"),)
        ids = tuple(operation.id for operation in others)
        return Outcome("target", written=ids, dead=dead, settled_tables=frozenset({"notes"}))

    cycle, writer = make_cycle(refuse_first)
    writer.lost_answers = 1
    add(spool, 100)
    cycle.turn()
    cycle.turn(force=True)
    assert (cycle.dead, len(spool.dead_letters()), spool.queue().total) == (1, 1, 0)


def orphans(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
    held: list[Verdict] = []
    dead: list[Verdict] = []
    for operation in batch.operations:
        if operation.due:
            verdict = Verdict(operation.id, "23503", "no parent", "fk", "parents")
            (held if hold(operation, "parents") else dead).append(verdict)
    return Outcome(
        "target", held=tuple(held), dead=tuple(dead), settled_tables=frozenset({"notes"})
    )


def test_a_child_waits_a_minute_for_its_parent_and_is_dead_then(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(orphans)
    add(spool, 100)
    cycle.turn()
    assert spool.queue().total == 100
    for _ in range(10):
        clock.now += 5.9
        cycle.turn()
    assert spool.dead_letters() == []
    for _ in range(3):
        clock.now += 60
        cycle.turn()
    assert len(spool.dead_letters()) == 100
    assert spool.dead_letters()[0].attempts > 3


def test_a_child_waits_longer_while_operations_for_its_parents_table_wait(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(orphans)
    add(spool, 100)
    cycle.turn()
    add(spool, 1, "parents")
    for _ in range(10):
        clock.now += 60
        spool.wait("parents", Waiting("locked", "55P03"), 60)
        cycle.turn()
    assert spool.dead_letters() == []


def test_a_child_is_tried_again_as_soon_as_its_parents_table_moved(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    def parents_only(batch: Batch, _: object) -> Outcome:
        ids = tuple(o.id for o in batch.operations if o.table == "parents")
        return Outcome("target", written=ids, settled_tables=frozenset({"parents"}))

    cycle, writer = make_cycle(orphans, parents_only, write_all)
    add(spool, 100)
    cycle.turn()
    add(spool, 100, "parents")
    cycle.turn()
    cycle.turn()
    assert len(writer.batches) == 3
    assert spool.queue().total == 0


def test_a_forced_turn_flushes_what_would_have_waited(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(write_all)
    add(spool)
    assert cycle.turn(force=True)
    assert spool.queue().total == 0


def test_somebody_who_waits_for_a_flush_gets_it_at_once(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    cycle, _ = make_cycle(write_all)
    add(spool)
    through = spool.request_flush()
    assert cycle.turn()
    assert spool.is_settled(through)


# Straight from the inbox


def sent(writer: ScriptedWriter) -> list[list[int]]:
    return [[operation.id for operation in batch.operations] for batch in writer.batches]


def drain(cycle: Cycle) -> None:
    """Flush until nothing is left that can be."""
    while cycle.turn(force=True):
        pass


def test_what_the_database_takes_never_enters_the_tables(
    spool: Spool, make_cycle: MakeCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle, writer = make_cycle(write_all)
    monkeypatch.setattr(fold, "insert", None)
    ids = [*add(spool, 60), *add(spool, 60, "others")]
    assert cycle.turn()
    assert sent(writer) == [ids]
    assert spool.conservation().written == 120


@pytest.mark.parametrize("fold_too", [True, False])
def test_a_look_at_the_queue_in_the_middle_of_a_flush_doubles_nothing(
    spool: Spool, make_cycle: MakeCycle, fold_too: bool
) -> None:
    late: list[int] = []

    def looked_at(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        late.extend(add(spool, 2))
        if fold_too:
            spool.fold()
        assert spool.queue().total == 7
        return write_all(batch, hold)

    cycle, writer = make_cycle(looked_at, write_all)
    ids = add(spool, 5)
    assert cycle.turn(force=True)
    assert cycle.turn(force=True)
    assert sent(writer) == [ids, late]
    assert spool.conservation().written == 7


def test_who_only_counts_leaves_what_is_queued_where_it_is(
    spool: Spool, make_cycle: MakeCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        assert spool.queue().total == spool.conservation().spooled == 120
        assert [(lane.table, lane.operations) for lane in spool.lanes()] == [
            ("notes", 60),
            ("others", 60),
        ]
        assert spool.report().queue.insert == 120
        return write_all(batch, hold)

    cycle, _ = make_cycle(counted)
    monkeypatch.setattr(fold, "insert", None)
    add(spool, 60)
    add(spool, 60, "others")
    assert cycle.turn()
    assert spool.conservation().written == 120


def test_what_is_read_ahead_is_written_next_together_with_what_came_later(
    spool: Spool, make_cycle: MakeCycle
) -> None:
    def more(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        ids.extend(add(spool, 2))
        return write_all(batch, hold)

    cycle, writer = make_cycle(more, write_all, size=4, max_size=4)
    ids = add(spool, 6)
    drain(cycle)
    assert sent(writer) == [ids[:4], ids[4:]]
    assert writer.ahead[:2] == ids[4:6]


def test_what_is_read_ahead_of_the_tables_is_written_next(
    spool: Spool, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(write_all, size=4, max_size=4)
    ids = add(spool, 10)
    spool.fold()
    drain(cycle)
    assert sent(writer) == [ids[:4], ids[4:8], ids[8:]]
    assert writer.ahead == ids[4:]


def test_what_was_read_ahead_and_given_up_since_is_not_written(
    spool: Spool, make_cycle: MakeCycle
) -> None:
    def give_up(batch: Batch, hold: Callable[[Operation, str], bool]) -> Outcome:
        assert cycle._ahead
        cycle._ahead.result()
        spool.bury([Verdict(ids[5], "23505", "by hand")])
        return write_all(batch, hold)

    cycle, writer = make_cycle(give_up, write_all, size=4, max_size=4)
    ids = add(spool, 10)
    spool.fold()
    drain(cycle)
    assert sent(writer) == [ids[:4], [ids[4], *ids[6:9]], ids[9:]]


def test_what_is_read_ahead_does_not_survive_a_failure(spool: Spool, make_cycle: MakeCycle) -> None:
    cycle, writer = make_cycle(fail(), write_all, size=4, max_size=4)
    ids = add(spool, 6)
    assert not cycle.turn(force=True)
    drain(cycle)
    assert sent(writer) == [ids[:4], ids[:4], ids[4:]]


def test_a_failure_to_read_ahead_fails_no_flush(
    spool: Spool, make_cycle: MakeCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise SpoolUnavailable("no answer", remedy="")

    cycle, writer = make_cycle(write_all, size=4, max_size=4)
    ids = add(spool, 6)
    with monkeypatch.context() as patch:
        patch.setattr(spool, "read_ahead", broken)
        assert cycle.turn(force=True)
        assert cycle.turn(force=True)
    assert sent(writer) == [ids[:4], ids[4:]]


def test_operations_of_a_table_that_has_some_in_the_tables_wait_for_those(
    spool: Spool, make_cycle: MakeCycle
) -> None:
    cycle, writer = make_cycle(write_all, size=4, max_size=4)
    ids = add(spool, 5)
    spool.fold()
    ids += add(spool, 5)
    drain(cycle)
    assert [i for batch in sent(writer) for i in batch] == ids


def test_operations_larger_than_what_is_read_at_once_go_straight_too(
    spool: Spool, make_cycle: MakeCycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "insert", None)
    cycle, writer = make_cycle(write_all)
    ids = [
        spool.append("insert", "notes", {"text": "x" * size}) for size in (6_000_000, 1, 7_000_000)
    ]
    drain(cycle)
    assert [i for batch in sent(writer) for i in batch] == ids
    assert spool.conservation().written == 3


def test_a_lane_that_waits_long_still_knows_what_its_position_says(
    spool: Spool, clock: Clock, make_cycle: MakeCycle
) -> None:
    wait = Outcome("target", waiting={"notes": Waiting("not there", "42P01")})
    cycle, writer = make_cycle(write_all, *[lambda *_: wait] * 40, write_all)
    for _ in range(45):
        add(spool, 100)
        clock.now += 100
        cycle.turn(force=True)
    assert spool.lanes() == []
    # Nothing but the first of these flushes has moved the position.
    assert writer.batches[0].nonce in writer.batches[40].known_nonces["notes"]
