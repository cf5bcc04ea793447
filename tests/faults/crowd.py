"""The processes of a host that are to die, as the tests start, stop and kill them."""

import json
import os
import signal
import subprocess
import sys
from itertools import count
from typing import Self

import psutil

from tests.hosts import PROJECT, Host, wait_until

#: Many small flushes: each has every step.
BATCHES = {
    "HELENA_BATCH_SIZE": "15",
    "HELENA_BATCH_MAX_SIZE": "20",
    "HELENA_BATCH_INTERVAL": "0.05",
}


class Crowd:
    """Starts processes of one host by forking one that has imported everything. A context manager.

    Each has a number of its own; `notes` holds a file for each number.
    """

    def __init__(self, host: Host) -> None:
        self.notes = host.state_dir / "notes"
        self.notes.mkdir()
        self._errors = (host.state_dir / "errors").open("w+")
        self._numbers = {rough: count(2 + rough, 2) for rough in (False, True)}
        self._alive: dict[int, psutil.Process | None] = {}
        self._mother = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.victims"],
            env=host.variables | BATCHES,
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.kill_all()
        with self._mother as mother:
            mother.kill()
        with self._errors as file:
            file.seek(0)
            errors = file.read()
        # One that ends by an error of its own would never come to its step.
        assert kind or "Traceback" not in errors, errors[:10_000]

    def start(
        self,
        *,
        flush: bool,
        rough: bool = False,
        step: str = "",
        skip: int = 0,
        halt: str = "SIGKILL",
    ) -> int:
        """Start a process that adds operations, and with `flush` writes them; its pid.

        With `rough` some of them are put back or refused. It gets the signal `halt` at a step that
        it has passed `skip` times.
        """
        number = next(self._numbers[rough])
        order = {
            "producer": number,
            "notes": str(self.notes / str(number)),
            "flush": flush,
            "step": step,
            "skip": skip,
            "halt": halt,
        }
        assert self._mother.stdin and self._mother.stdout
        self._mother.stdin.write(json.dumps(order) + "\n")
        self._mother.stdin.flush()
        pid = int(self._mother.stdout.readline())
        try:
            self._alive[pid] = psutil.Process(pid)
        except psutil.NoSuchProcess:
            # It has come to its step, and died, already.
            self._alive[pid] = None
        return pid

    def kill(self, pid: int) -> None:
        """Kill a process, wherever it is, and wait until it is gone."""
        if self._is_running(pid):
            os.kill(pid, signal.SIGKILL)
        self.wait_gone(pid)

    def kill_all(self) -> None:
        """Kill those that are left."""
        for pid in list(self._alive):
            self.kill(pid)

    def wait_gone(self, pid: int, step: str = "") -> None:
        """Wait until it has died, at a step that it may come to late."""
        wait_until(lambda: not self._is_running(pid), f"the end of a process {step}", limit=100)
        del self._alive[pid]

    def wait_stopped(self, pid: int) -> None:
        """Wait until it has come to its step."""
        process = self._alive[pid]
        assert process is not None, "a process that was to stop has died"
        wait_until(
            lambda: process.status() == psutil.STATUS_STOPPED,
            "the step of a process",
            limit=100,
        )

    def _is_running(self, pid: int) -> bool:
        process = self._alive[pid]
        return process is not None and process.is_running()
