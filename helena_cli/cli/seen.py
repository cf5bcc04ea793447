"""What there is to see at one moment, and what of it a person must act on. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from msgspec import Struct

from helena_cli.batch.ledger import FlushRecord, Lane, Queue
from helena_cli.cli import render
from helena_cli.cli.charts import Series
from helena_cli.cli.checks import Check
from helena_cli.documents.watch_state import WatchState

CRITICAL, WARN = render.STYLES["critical"], render.STYLES["warn"]

#: Checks that the view itself shows, and sooner.
SHOWN_ANYWAY = frozenset({"dead_letters", "flusher"})

#: Checks that only repeat, while flushes fail, that they do.
SHOWN_BY_FAILURE = frozenset({"queue_age", "response_time"})


class Seen(Struct, frozen=True):
    """One look at everything. Two looks that are equal make equal pictures."""

    target: str
    queue: Queue
    lanes: tuple[Lane, ...] = ()
    #: The process that wrote last; whether one writes now, and whether it is this one.
    flusher: int | None = None
    flusher_running: bool = False
    flusher_here: bool = False
    #: Seconds without a sign of life of the flusher, when they are too many.
    silence: float | None = None
    #: The last flushes, newest first.
    flushes: tuple[FlushRecord, ...] = ()
    series: tuple[Series, ...] = ()
    watch: WatchState = WatchState()
    checks: tuple[Check, ...] = ()
    #: Why the checks could not be made of late.
    unchecked: str | None = None
    #: Why the queue could not be read at this look.
    trouble: str | None = None


class Row(Struct, frozen=True):
    """A name on the left, text beside it, and at its end a path whose end matters most."""

    label: str
    text: str
    style: str = ""
    path: str = ""


def urgent(seen: Seen) -> Iterator[Row]:
    """What a person must act on, the worst first."""
    failed = _failed(seen.flushes)
    shown = SHOWN_ANYWAY | (SHOWN_BY_FAILURE if failed else frozenset())
    if seen.trouble is not None:
        yield Row("critical", seen.trouble, CRITICAL)
    yield from _failing(failed, seen.watch.failure)
    yield from _silent(seen)
    for root in seen.watch.roots:
        if root.mode == "away":
            yield Row("away", with_reason(root.path, root.reason), CRITICAL)
    yield from _waiting(seen.lanes)
    for check in seen.checks:
        if check.status in {"warn", "critical"} and check.name not in shown:
            remedy = f"; what to do: {check.remedy}" if check.remedy else ""
            text = f"{check.name}: {check.message}{remedy}"
            yield Row(check.status, text, render.STYLES[check.status])
    for change in seen.watch.changes:
        if change.change == "failed":
            yield Row("failed", f"{clock(change.at)}  {change.path}", WARN)


def _failed(flushes: Sequence[FlushRecord]) -> list[FlushRecord]:
    """The failures since the last flush that succeeded, the last one first."""
    return [*takewhile(lambda flush: flush.error is not None, flushes)]


def _failing(failed: Sequence[FlushRecord], folders: str | None) -> Iterator[Row]:
    """Why nothing is written, and why the folders cannot be looked at: often it is the same."""
    error = (failed[0].error or "") if failed else ""
    if folders is not None and failed and error in folders:
        # It says what to do as well.
        error = folders
    elif folders is not None:
        yield Row("critical", f"the folders: {folders}", CRITICAL)
    if failed:
        since = f" since {clock(failed[-1].at)}" if len(failed) > 1 else ""
        tries = f"{render.many(len(failed), 'try', 'tries')}{since}, the last {clock(failed[0].at)}"
        stop = "" if error.endswith(".") else "."
        text = f"{tries}: {error}{stop} The operations stay queued, and it is tried again."
        yield Row("flush failed", text, CRITICAL)


def _silent(seen: Seen) -> Iterator[Row]:
    """A flusher that hangs, or none although something waits."""
    if seen.silence is not None:
        text = f"the flusher gave no sign of life for {render.duration(seen.silence)}"
        yield Row("critical", f"{text}; if it hangs, end it: another takes over", CRITICAL)
    elif not seen.flusher_running and seen.queue.total:
        yield Row("warn", "no process of this host writes the queue", WARN)


def _waiting(lanes: Iterable[Lane]) -> Iterator[Row]:
    """The tables that wait, together where the reason is the same."""
    together: dict[tuple[str, str | None], list[Lane]] = {}
    for lane in lanes:
        if lane.reason:
            together.setdefault((lane.reason, lane.remedy), []).append(lane)
    for (reason, remedy), waiting in together.items():
        tables = ", ".join(lane.table for lane in waiting)
        count = render.many(sum(lane.operations for lane in waiting), "operation")
        since = clock(min((lane.since for lane in waiting if lane.since), default=None))
        cure = f"; what to do: {remedy}" if remedy else ""
        text = f"{tables} ({count}, since {since}): {reason}{cure}"
        yield Row("table waits", text, WARN)


def with_reason(path: str, reason: str) -> str:
    return f"{path}: {reason}" if reason else path


def clock(at: float | None) -> str:
    """A Unix time as the clock on the wall shows it, without the day."""
    return render.local_time(at)[-8:]
