"""Memory of a real `helena watch` with a long queue and no database, on Linux."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from helena_cli import config
from helena_cli.runtime import Runtime
from tests.benchmarks import memory
from tests.hosts import wait_until

#: Nobody listens there.
NOWHERE = "host=127.0.0.1 port=1 dbname=nowhere"

#: So many attempts to write have failed before the memory is read.
FAILURES = 5


def resident(count: int) -> tuple[float, float]:
    """Resident MiB of a watcher with so many operations queued: at last, and at its peak."""
    with tempfile.TemporaryDirectory(prefix="helena-", dir="/tmp") as name:
        folder = Path(name, "notes")
        folder.mkdir()
        (folder / "note.md").write_text("# A note\n", encoding="utf-8")
        helena = {
            "HELENA_DSN": NOWHERE,
            "HELENA_STATE_DIR": str(Path(name, "state")),
            "HELENA_METRICS_PORT": "0",
        }
        fill = [sys.executable, "-c", memory.FILL, json.dumps(helena), str(count)]
        subprocess.run(fill, check=True)
        with Runtime(config.load(environ=helena)) as runtime:
            process = subprocess.Popen(
                [sys.executable, "-m", "helena_cli", "watch", folder],
                env={**os.environ, **helena},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: _tried(runtime, process), "it has tried to write")
                assert runtime.spool.queue().total == count
                return _resident(process.pid)
            finally:
                process.terminate()
                process.wait()


def _tried(runtime: Runtime, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the watcher has ended"
    return runtime.spool.flushes().failures >= FAILURES


def _resident(pid: int) -> tuple[float, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return _mebibytes("VmRSS", status), _mebibytes("VmHWM", status)


def _mebibytes(name: str, status: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None, f"{name} is told on Linux only"
    return int(found[1]) / 1024
