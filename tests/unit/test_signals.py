"""What signals ask for is noted; a second wish for the end is granted at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from helena_cli.host import signals
from helena_cli.host.signals import Signals

ENDS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def kept() -> Iterator[None]:
    """Whatever a test does, the handlers are those of before."""
    before = {number: signal.getsignal(number) for number in (*ENDS, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDS)
def test_the_first_asks_for_the_end_and_the_second_would_end_it(number: signal.Signals):
    with kept(), Signals() as asked:
        assert not asked.stopping
        os.kill(os.getpid(), number)
        assert asked.stopping
        assert [signal.getsignal(one) for one in ENDS] == [signal.SIG_DFL] * 2


def test_afterwards_the_handlers_are_those_of_before():
    with kept():
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        mine = signal.getsignal(signal.SIGTERM)
        with Signals():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, before)


def test_a_hangup_asks_once_to_read_the_configuration_again():
    with kept(), Signals() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked.take_reload()
        assert not asked.take_reload()
        assert not asked.stopping


def test_a_hangup_of_the_terminal_asks_for_the_end(monkeypatch):
    there = [True]
    monkeypatch.setattr(signals, "_has_terminal", lambda: there[0])
    with kept(), Signals() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked.take_reload()
        there[0] = False
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked.stopping
        assert not asked.take_reload()


def test_a_signal_ends_the_wait():
    with kept(), Signals() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        began = time.monotonic()
        asked.wait(60.0)
        assert time.monotonic() - began < 30.0
        # What was asked for once is not waited for again.
        asked.wait(0.0)


def test_many_signals_fit_in():
    with kept(), Signals() as asked:
        for _ in range(100_000):
            asked._handle(signal.SIGHUP, None)
        asked.wait(0.0)
        assert asked.take_reload()


def test_a_process_that_is_told_twice_is_gone():
    script = (
        "import time\n"
        "from helena_cli.host.signals import Signals\n"
        "with Signals() as asked:\n"
        "    print('ready', flush=True)\n"
        "    while not asked.stopping: asked.wait(60)\n"
        "    print('stopping', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            for line in (b"ready\n", b"stopping\n"):
                assert process.stdout.readline() == line
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM
        finally:
            process.kill()
