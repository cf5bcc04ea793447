"""What a service manager hears, over real sockets."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helena_cli.host.notify import Notifier


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """The service manager's end. Not bound."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(10)
        yield channel


@pytest.fixture
def address(manager: socket.socket, state_dir: Path) -> str:
    """What NOTIFY_SOCKET says, after the manager listens there."""
    path = str(state_dir / "notify")
    manager.bind(path)
    return path


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_each_state_is_told_in_the_words_of_sd_notify(manager: socket.socket, address: str):
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready()
    assert heard(manager) == ["READY=1"]
    notifier.alive()
    assert heard(manager) == ["WATCHDOG=1"]
    notifier.status("3 folders")
    assert heard(manager) == ["STATUS=3 folders"]
    notifier.stopping()
    assert heard(manager) == ["STOPPING=1"]


def test_a_reload_carries_the_time_at_which_it_began(manager: socket.socket, address: str):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier({"NOTIFY_SOCKET": address}).reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = heard(manager)
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= after


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets without a file")
def test_a_socket_without_a_file_is_reached_too(manager: socket.socket):
    name = f"helena-{secrets.token_hex(8)}"
    manager.bind(f"\0{name}")
    Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
    assert heard(manager) == ["READY=1"]


def test_a_status_is_one_line_and_never_too_long(manager: socket.socket, address: str):
    Notifier({"NOTIFY_SOCKET": address}).status("a\nREADY=1\r\n caf\udce9 " + "x" * 5000)
    (line,) = heard(manager)
    assert line.startswith("STATUS=a READY=1 caf\\udce9 xxx")
    assert len(line) < 1100


def test_without_a_service_manager_nothing_happens():
    notifier = Notifier({})
    notifier.ready()
    notifier.reloading()
    notifier.alive()
    notifier.status("on my own")
    notifier.stopping()
    assert notifier.watchdog_interval is None


@pytest.mark.parametrize("name", ["/no/such/socket", "/" + "x" * 200, "relative", "vsock:2:1"])
def test_a_manager_that_cannot_be_reached_is_told_nothing_and_harms_nothing(
    name: str, caplog: pytest.LogCaptureFixture
):
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready()
    notifier.alive()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_manager_that_does_not_read_holds_nobody_up(manager: socket.socket, address: str):
    notifier = Notifier({"NOTIFY_SOCKET": address})
    with contextlib.ExitStack() as senders:
        sent = 1
        # Each sender has a limit of its own. The queue is full when a fresh one cannot send at all.
        while sent:
            other = senders.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            other.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while other.sendto(b"x", address):
                    sent += 1
        # Comes back: without a limit it would wait for the reader, which is this thread.
        notifier.alive()


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({"WATCHDOG_USEC": "120000000"}, 60.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_a_sign_of_life_is_due_twice_as_often_as_the_manager_waits(
    address: str, variables: dict[str, str], interval: float | None
):
    assert Notifier({"NOTIFY_SOCKET": address, **variables}).watchdog_interval == interval


def test_without_a_socket_no_sign_of_life_is_due():
    assert Notifier({"WATCHDOG_USEC": "120000000"}).watchdog_interval is None


def test_children_do_not_inherit_the_line_to_the_manager(
    manager: socket.socket, address: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, str(os.getpid()))
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier()
    shown = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert "NOTIFY_SOCKET" not in shown
    assert "WATCHDOG" not in shown
    notifier.ready()
    assert heard(manager) == ["READY=1"]
