"""Real-time writers for tests: real processes whose scripts have names that nobody else has.

Tests in parallel look at the same machine, and must never find each other's processes.
"""

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.hosts import wait_until

#: Says that it is there, by a file beside it, and sleeps.
SLEEPS = """
import pathlib, sys, time
pathlib.Path(__file__).with_suffix(".up").touch()
time.sleep(600)
"""
DEAF = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{SLEEPS}
"""
WITH_CHILDREN = f"""
import subprocess
for n in range(2):
    subprocess.Popen(["sh", "-c", "sleep 600; true"])
{SLEEPS}
"""
#: A supervisor as people write them.
RESTARTS = """
import subprocess, sys, time
while True:
    subprocess.run([sys.executable, sys.argv[1]])
    time.sleep(0.2)
"""

#: One that nobody can find out: what it starts is no child of its own.
RESTARTS_UNSEEN = """
import psutil, subprocess, sys, time
wanted = [sys.executable, sys.argv[1]]
while True:
    if not any(one.info["cmdline"] == wanted for one in psutil.process_iter(["cmdline"])):
        subprocess.run(["setsid", "-f", *wanted])
    time.sleep(0.1)
"""

#: For a user who may not read the interpreter of whoever runs the tests.
SHELL = "while :; do sleep 0.1; done\n"

Process = subprocess.Popen[bytes]


class Writers:
    """Scripts in a folder, and what runs of them. `close` ends all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(4)
        self._started: list[Process] = []

    def name(self, label: str) -> str:
        """A name of its own for this test."""
        return f"writer_{self.mark}_{label}"

    def script(self, label: str, text: str = SLEEPS) -> Path:
        """A script of that name."""
        path = self.folder / f"{self.name(label)}.py"
        path.write_text(text)
        return path

    def run(
        self, argv: Sequence[object], *, up: Path | None = None, nobody: bool = False
    ) -> Process:
        """Start a process; wait until the script `up` runs."""
        process = subprocess.Popen(
            [str(word) for word in argv],
            # It stays open: what reads it waits.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
            user="nobody" if nobody else None,
            group="nogroup" if nobody else None,
            extra_groups=[] if nobody else None,
        )
        self._started.append(process)
        if up is not None:
            wait_until(up.with_suffix(".up").exists, f"{up.name} runs")
        return process

    def writer(self, label: str, text: str = SLEEPS) -> Process:
        """Write a script and start it."""
        path = self.script(label, text)
        return self.run([sys.executable, path], up=path)

    def running(self, label: str) -> list[psutil.Process]:
        """The processes that have this name as a word of their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.name(label) in word for word in process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        """End everything that has the mark, whoever started it."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.mark in word for word in process.cmdline()):
                    process.kill()
        for started in self._started:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(started.pid).children(recursive=True):
                    child.kill()
            started.kill()
            started.communicate()
