"""The live view looks often and draws seldom, and survives what it looks at."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helena_cli import config
from helena_cli.batch.flush import Waiting
from helena_cli.batch.ledger import Flusher, FlushRecord
from helena_cli.cli import charts, live
from helena_cli.cli.checks import Check
from helena_cli.cli.live import LiveView, Look
from helena_cli.documents.watch_state import WatchState
from helena_cli.errors import SpoolUnavailable
from helena_cli.runtime import Runtime
from tests.hosts import wait_until
from tests.spools import fill


class Terminal(io.StringIO):
    """A stream that claims to be a terminal, of any size."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Watching:
    """Stands for the watcher: says what it is told to, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.state = WatchState()
        self.error: Exception | None = None

    def __call__(self) -> WatchState:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.state


@pytest.fixture
def runtime(state_dir: Path) -> Iterator[Runtime]:
    """One that never meets its database."""
    variables = {"HELENA_STATE_DIR": str(state_dir), "HELENA_DSN": "host=127.0.0.1 port=1"}
    with Runtime(config.load(environ=variables)) as runtime:
        yield runtime


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal for stdout. No fixture: pytest puts its own stdout in place for the test."""
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    return screen


@pytest.fixture
def watching() -> Watching:
    return Watching()


def test_one_look_sees_what_the_spool_holds(runtime: Runtime, watching: Watching):
    spool = runtime.spool
    fill(spool, 3)
    spool.wait("t", Waiting("it is missing"), 60.0)
    spool.beat(Flusher(4_000_000, "host", 1.0, 1.0))
    for number in range(3):
        spool.record(FlushRecord(1_700_000_000.0 + number, number, number, 0.1))
    check = Check("pool", "ok", 1, 2, "fine")
    look = Look(runtime, watching)
    seen = look([check])
    assert seen.target == runtime.target.label
    assert (seen.queue.total, seen.queue.insert) == (3, 3)
    assert [(lane.table, lane.reason) for lane in seen.lanes] == [("t", "it is missing")]
    assert (seen.flusher, seen.flusher_running, seen.flusher_here) == (4_000_000, False, False)
    assert [flush.operations for flush in seen.flushes] == [2, 1, 0]
    assert seen.checks == (check,)
    spool.record(FlushRecord(1_700_000_009.0, 9, 9, 0.1))
    assert [flush.operations for flush in look([]).flushes] == [9, 2, 1, 0]
    look.close()


def test_what_cannot_be_read_is_said_and_the_last_look_stays(runtime: Runtime, watching: Watching):
    fill(runtime.spool, 3)
    look = Look(runtime, watching)
    look([])
    watching.error = SpoolUnavailable("The queue is gone.", remedy="Mend it.")
    seen = look([])
    assert (seen.queue.total, seen.trouble) == (3, "The queue is gone. Mend it.")
    watching.error = None
    assert look([]).trouble is None
    look.close()


def test_nothing_is_drawn_while_nothing_changes(
    runtime: Runtime, watching: Watching, monkeypatch: pytest.MonkeyPatch
):
    terminal = make_terminal(monkeypatch)
    # A chart that moves on to its next column is drawn.
    monkeypatch.setattr(charts, "COLUMN_SECONDS", 1_000_000)
    with LiveView(runtime, watching):
        looks = watching.asked
        wait_until(lambda: watching.asked > looks + 2, "some looks")
        drawn = terminal.getvalue()
        looks = watching.asked
        wait_until(lambda: watching.asked > looks + 20, "many looks")
        assert terminal.getvalue() == drawn
        fill(runtime.spool, 7)
        wait_until(lambda: "7 operations" in terminal.getvalue(), "the new picture")


def test_a_look_that_fails_ends_nothing(
    runtime: Runtime, watching: Watching, monkeypatch: pytest.MonkeyPatch
):
    terminal = make_terminal(monkeypatch)
    with LiveView(runtime, watching):
        watching.error = RuntimeError("a bug")
        looks = watching.asked
        wait_until(lambda: watching.asked > looks + 1, "a look that failed")
        watching.error = None
        watching.state = WatchState(failure="the folders cannot be read")
        wait_until(lambda: "the folders cannot be read" in terminal.getvalue(), "the picture")


def test_checks_are_shown_when_they_come_and_may_fail(
    runtime: Runtime,
    watching: Watching,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(live, "CHECK_AGAIN_SECONDS", 0.01)
    busy = True

    def checks() -> list[Check]:
        if busy:
            raise SpoolUnavailable("It is busy.", remedy="Wait.")
        return [Check("pool", "critical", 97, 97, "all taken", "End some.")]

    with LiveView(runtime, watching, checks):
        wait_until(lambda: "could not be made: It is busy." in terminal.getvalue(), "why not")
        busy = False
        wait_until(lambda: "pool: all taken; what to do: End some." in terminal.getvalue(), "it")
        terminal.truncate(0)
        watching.state = WatchState(failure="anything new")
        wait_until(lambda: "anything new" in terminal.getvalue(), "the next picture")
        assert "It is busy" not in terminal.getvalue()
    assert not caplog.records


def test_the_end_of_the_block_is_the_last_picture(
    runtime: Runtime, watching: Watching, monkeypatch: pytest.MonkeyPatch
):
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr(live, "LOOK_SECONDS", 100.0)
    with LiveView(runtime, watching):
        fill(runtime.spool, 7)
    assert "7 operations" in terminal.getvalue()
    assert terminal.getvalue().endswith(("\n", "\x1b[?25h"))


def test_a_dumb_terminal_and_a_pipe_have_no_live_view(monkeypatch: pytest.MonkeyPatch):
    make_terminal(monkeypatch)
    assert LiveView.possible()
    monkeypatch.setenv("TERM", "dumb")
    assert not LiveView.possible()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not LiveView.possible()
