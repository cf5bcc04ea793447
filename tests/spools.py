"""What the tests of the spool share: a clock that is set by hand, and the law."""

from collections.abc import Iterable, Mapping

from helena_cli.batch.flush import Outcome
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict


class Clock:
    """Unix time in seconds that passes only when a test says so."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def assert_law(spool: Spool) -> None:
    """What was accepted is written, coalesced, dead, dropped or still there; the counts agree."""
    law = spool.conservation()
    assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled, law
    assert min(law.accepted, law.written, law.coalesced, law.dead, law.dropped, law.spooled) >= 0
    queue = spool.queue()
    assert queue.total == queue.insert + queue.update + queue.message == law.spooled
    assert queue.dead_letters == law.dead
    assert sum(lane.operations for lane in spool.lanes()) == law.spooled


def fill(spool: Spool, count: int, table: str = "t") -> list[int]:
    """Queue so many inserts."""
    return spool.extend(("insert", table, {"n": number}) for number in range(count))


def settle(
    spool: Spool,
    written: Iterable[int] = (),
    *,
    coalesced: Iterable[int] = (),
    skipped: Iterable[int] = (),
    held: Mapping[int, float] | None = None,
    tables: Iterable[str] = ("t",),
) -> None:
    """Settle as after a commit; `held` is id → seconds."""
    outcome = Outcome(
        "target",
        written=tuple(written),
        coalesced=tuple(coalesced),
        skipped=tuple(skipped),
        held=tuple(Verdict(i, "23503", "no parent") for i in held or {}),
        settled_tables=frozenset(tables),
    )
    spool.fold()
    spool.settle(outcome, "n", held or {})


def ids(spool: Spool, table: str = "t") -> list[int]:
    """The ids that wait in a lane."""
    return [operation.id for operation in spool.queued(table)]
