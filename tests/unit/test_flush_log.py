"""What `helena watch` prints without a terminal: each flush once, and the log beside it."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import helena_cli
from helena_cli.batch.ledger import KEPT_FLUSHES, FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.cli import flush_log
from helena_cli.cli.flush_log import FlushLog
from helena_cli.cli.options import PACKAGE_LOG
from tests.hosts import wait_until

PROJECT = Path(helena_cli.__file__).parent.parent
NOON = time.mktime((2026, 11, 24, 12, 0, 0, 0, 0, -1))


@pytest.fixture
def spool(state_dir: Path) -> Iterator[Spool]:
    with closing(Spool.open(state_dir / "test.spool")) as spool:
        yield spool


@pytest.fixture(autouse=True)
def _same_log_afterwards() -> Iterator[None]:
    before = PACKAGE_LOG.handlers[:]
    yield
    PACKAGE_LOG.handlers[:] = before


def flush(number: int, error: str | None = None) -> FlushRecord:
    return FlushRecord(NOON + number, number, number, 0.125, error)


def numbers(spool: Spool, after: int) -> list[int]:
    return [number for number, _ in spool.recent_flushes(after)]


# The books


def test_flushes_are_counted_from_the_first_on_also_those_that_failed(spool: Spool):
    for number in range(1, 4):
        spool.record(flush(number, "away" if number == 2 else None))
    assert spool.recent_flushes(0) == [(1, flush(1)), (2, flush(2, "away")), (3, flush(3))]
    assert numbers(spool, 2) == [3]
    assert numbers(spool, 3) == []


def test_a_flush_keeps_its_number_when_older_ones_are_forgotten(spool: Spool):
    for number in range(1, KEPT_FLUSHES + 11):
        spool.record(flush(number))
    assert numbers(spool, 0) == list(range(11, KEPT_FLUSHES + 11))
    assert numbers(spool, KEPT_FLUSHES + 8) == [KEPT_FLUSHES + 9, KEPT_FLUSHES + 10]


def test_books_that_began_anew_are_read_from_their_beginning(spool: Spool):
    spool.record(flush(1))
    assert numbers(spool, 500) == [1]


# The lines


class Printed:
    """What was printed on stdout from the beginning to now."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().out
        return self._text.splitlines()


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


def test_each_flush_is_one_line_also_the_last_one(spool: Spool, printed: Printed):
    spool.record(flush(1))
    with FlushLog(spool, as_json=False):
        spool.record(flush(2))
        spool.record(flush(3, "gone:\nFATAL\x1b[2J"))
        wait_until(lambda: len(printed.lines()) == 2, "the flushes so far")
        spool.record(flush(1000))
        # The engine and its spool may have ended by then.
        spool.close()
    assert printed.lines() == [
        "2026-11-24 12:00:02 flush: 2 operations, 2 rows, 0.125 s",
        "2026-11-24 12:00:03 flush failed after 0.125 s: gone: FATAL[2J",
        "2026-11-24 12:16:40 flush: 1,000 operations, 1,000 rows, 0.125 s",
    ]


def test_for_programs_each_flush_is_one_json_object(
    spool: Spool, capsys: pytest.CaptureFixture[str]
):
    with FlushLog(spool, as_json=True):
        spool.record(FlushRecord(0.5, 3, 2, 0.1))
        spool.record(FlushRecord(1, 0, 0, 5.0, "two\nlines"))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "time": "1970-01-01T00:00:00.500+00:00",
            "event": "flush",
            "operations": 3,
            "rows": 2,
            "seconds": 0.1,
            "error": None,
        },
        {
            "time": "1970-01-01T00:00:01.000+00:00",
            "event": "flush",
            "operations": 0,
            "rows": 0,
            "seconds": 5.0,
            "error": "two\nlines",
        },
    ]


def _await_lines(printed: Printed, count: int) -> None:
    wait_until(lambda: len(printed.lines()) > count, "lines")


def test_no_flush_is_missed_or_doubled_however_they_fall_between_two_looks(
    spool: Spool, printed: Printed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flush_log, "LOOK_SECONDS", 0.001)
    with FlushLog(spool, as_json=True):
        for number in range(2 * KEPT_FLUSHES):
            spool.record(flush(number))
            if number % 50 == 0:
                _await_lines(printed, number - 100)
    counted = [json.loads(line)["operations"] for line in printed.lines()]
    assert counted == list(range(2 * KEPT_FLUSHES))


def test_flushes_that_came_too_fast_are_counted_at_least(
    spool: Spool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flush_log, "LOOK_SECONDS", 100.0)
    with FlushLog(spool, as_json=False):
        for number in range(1, KEPT_FLUSHES + 3):
            spool.record(flush(number))
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == KEPT_FLUSHES
    assert "2 flushes came too fast to be shown" in shown.err


# The log


def test_the_log_speaks_as_the_flushes_do(spool: Spool, capsys: pytest.CaptureFixture[str]):
    log = logging.getLogger("helena_cli.batch.cycle")
    with FlushLog(spool, as_json=False):
        log.error("no\nanswer")
    with FlushLog(spool, as_json=True):
        try:
            raise ValueError("wrong")
        except ValueError:
            log.exception("a bug")
    log.error("closed")
    shown = capsys.readouterr()
    text, document, last = shown.err.splitlines()
    assert text.endswith(" error: no answer")
    assert json.loads(last)["message"] == "closed"
    told = json.loads(document)
    assert told.pop("time").endswith("+00:00")
    assert told.pop("exception").endswith("ValueError: wrong")
    assert told == {
        "event": "log",
        "level": "error",
        "logger": "helena_cli.batch.cycle",
        "message": "a bug",
    }
    assert shown.out == ""


SCRIPT = """
import sys
from pathlib import Path
from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.cli.flush_log import FlushLog

spool = Spool.open(Path(sys.argv[1]))
with FlushLog(spool, as_json=True):
    for number in sys.stdin:
        spool.record(FlushRecord(0.0, int(number), 0, 0.0))
spool.close()
print("on the way out", flush=True)
sys.stderr.write("ended")
"""


def test_a_reader_that_goes_away_ends_the_lines_and_not_the_program(state_dir: Path):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, state_dir / "test.spool"],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("1\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["operations"] == 1
        process.stdout.close()
        process.stdin.write("2\n")
        process.stdin.flush()
        told = json.loads(process.stderr.readline())
        assert "nobody reads the flushes" in told["message"]
        process.stdin.write("3\n")
        process.stdin.close()
        assert process.stderr.read() == "ended"
    assert process.returncode == 0
