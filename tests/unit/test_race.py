"""The writers of the race between the old way and Helena, by themselves."""

import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from helena_cli.errors import HelenaError
from helena_cli.proof import race

ROWS = [{"n": n} for n in range(2000)]


def test_an_interrupt_ends_the_writers_although_it_does_not_wake_whoever_waits_for_them():
    written: list[int] = []

    def write(row: Mapping[str, Any]) -> None:
        written.append(row["n"])
        if len(written) == 20:
            # To this thread: the main one is left waiting, as when it comes right before a wait.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        time.sleep(0.005)

    with pytest.raises(KeyboardInterrupt):
        race._in_threads(write, ROWS)
    assert len(written) < len(ROWS)


def test_a_writer_that_fails_ends_the_others():
    written: list[int] = []

    def write(row: Mapping[str, Any]) -> None:
        if row["n"] == 40:
            raise HelenaError("the database is away", remedy="")
        written.append(row["n"])
        time.sleep(0.005)

    with pytest.raises(HelenaError, match="away"):
        race._in_threads(write, ROWS)
    assert len(written) < len(ROWS)
