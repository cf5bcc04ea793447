"""`helena watch` on a real terminal: what it draws, and how it leaves the terminal behind."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Host

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"

BROKEN = """
from helena_cli import config
from helena_cli.cli.live import LiveView
from helena_cli.documents.watch_state import WatchState
from helena_cli.runtime import Runtime

with Runtime(config.load()) as runtime, LiveView(runtime, WatchState):
    raise RuntimeError("something broke")
"""


class Session:
    """A program on a terminal of 80 columns and 24 lines."""

    def __init__(self, host: Host, *arguments: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(slave)
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**host.variables, "TERM": "xterm-256color", "HELENA_METRICS_PORT": "0"}
            | variables,
            cwd=host.state_dir,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            # The terminal's own: Ctrl-C reaches it and not the tests.
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        self._slave = slave

    def text(self) -> str:
        """All that was written so far, without what moves the cursor."""
        while select.select([self._master], [], [], 0)[0]:
            self.output += os.read(self._master, 65536).decode()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.text(), text)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {what}\n{self.text()}"
            assert self.process.poll() is None, f"ended before: {what}\n{self.text()}"
            time.sleep(0.01)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Wait for the end, and return how it ended. The terminal must go on taking its output."""
        deadline = time.monotonic() + 40
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end\n{self.text()}"
            self.text()
            time.sleep(0.01)
        self.text()
        assert termios.tcgetattr(self._slave) == self.modes
        return int(self.process.returncode)

    def hang_up(self) -> None:
        """Close the terminal's window."""
        os.close(self._slave)
        os.close(self._master)
        self._master = self._slave = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._master >= 0:
            self.hang_up()


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def start(host: Host) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def start(*arguments: str, **variables: str) -> Session:
        sessions.append(Session(host, *arguments, **variables))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


@pytest.fixture
def notes(host: Host) -> Path:
    folder = host.state_dir / "notes"
    folder.mkdir()
    (folder / "first.md").write_text("# First\n")
    return folder


def cursor_is_visible(output: str) -> bool:
    return output.rfind(SHOW) > output.rfind(HIDE)


def test_it_shows_what_happens_and_ends_with_what_became_of_it(
    start: Callable[..., Session], notes: Path, host: Host
):
    session = start("-m", "helena_cli", "watch", str(notes))
    session.wait_for("first.md")
    (notes / "second.md").write_text("# Second\n")
    session.wait_for("second.md")
    with host.runtime() as runtime:
        runtime.spool.extend(("message", "nowhere", {"n": n}) for n in range(3))
    session.wait_for("nowhere (3 operations, since")
    session.wait_for("Create the table")
    assert session.process.poll() is None
    session.type("\x03")
    # What waits for its table remains.
    assert session.end() == 1
    assert cursor_is_visible(session.output)
    written = host.sql("SELECT count(*) FROM es_document_references")[0][0]
    assert written == 2
    lines = session.text().splitlines()
    assert [
        line for line in lines if re.match(r"Last flushes +\d\d:\d\d:\d\d +\d+ operation", line)
    ]
    assert max(map(len, lines)) <= 80


def test_without_colours_it_says_the_same(start: Callable[..., Session], notes: Path):
    session = start("-m", "helena_cli", "watch", str(notes), NO_COLOR="1")
    session.wait_for("first.md")
    session.type("\x03")
    assert session.end() == 0
    assert "Helena writes to" in session.text()
    assert re.findall(r"\x1b\[(?:[0-9]+;)*(?:3[0-9]|9[0-7])(?:;[0-9]+)*m", session.output) == []


def test_an_exception_leaves_the_terminal_as_it_was(start: Callable[..., Session]):
    session = start("-c", BROKEN)
    assert session.end() == 1
    assert "RuntimeError: something broke" in session.text()
    assert cursor_is_visible(session.output)


def test_a_sudden_death_leaves_a_visible_cursor(start: Callable[..., Session], notes: Path):
    session = start("-m", "helena_cli", "watch", str(notes))
    session.wait_for("first.md")
    session.process.send_signal(signal.SIGKILL)
    assert session.end() == -signal.SIGKILL
    assert cursor_is_visible(session.output)


def test_a_terminal_that_goes_away_ends_it_in_good_order(
    start: Callable[..., Session], notes: Path, host: Host
):
    session = start("-m", "helena_cli", "watch", str(notes))
    session.wait_for("first.md")
    (notes / "second.md").write_text("# Second\n")
    session.wait_for("second.md")
    session.hang_up()
    assert session.process.wait(40) == 0
    assert host.sql("SELECT count(*) FROM es_document_references") == [(2,)]
    assert host.law().spooled == 0
