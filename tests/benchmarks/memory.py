"""Peak memory of a process that flushes a long queue, against one with a short queue."""

import json
import subprocess
import sys
import tempfile

from tests.benchmarks import server

#: Runs in a process of its own: a peak never falls again.
DRAIN = """
import json, re, sys
from pathlib import Path
from helena_cli import config
from helena_cli.runtime import Runtime
with Runtime(config.load(environ=json.loads(sys.argv[1]))) as runtime:
    runtime.drain()
    assert runtime.spool.queue().total == 0
# Not ru_maxrss: that begins with the size of the process which started this one.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""

FILL = """
import json, sys
from helena_cli import config
from helena_cli.runtime import Runtime
runtime = Runtime(config.load(environ=json.loads(sys.argv[1])))
count = int(sys.argv[2])
for start in range(0, count, 10_000):
    runtime.spool.extend(
        ("message", "messages", {"id": str(n), "sender": "s", "message_type": "t", "content": "c"})
        for n in range(start, min(start + 10_000, count))
    )
runtime.close()
"""


def peak(admin: str, count: int) -> float:
    """Peak resident MiB of a process that writes `count` queued operations, on Linux."""
    with (
        server.database(admin) as dsn,
        tempfile.TemporaryDirectory(prefix="helena-", dir="/tmp") as state,
    ):
        environ = json.dumps({"HELENA_DSN": dsn, "HELENA_STATE_DIR": state})
        subprocess.run([sys.executable, "-c", FILL, environ, str(count)], check=True)
        drain = [sys.executable, "-c", DRAIN, environ]
        answer = subprocess.run(drain, check=True, capture_output=True, text=True)
        return int(answer.stdout) / 1024
