"""How long a person waits for `helena`: the help, against an empty program; and the status."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from helena_cli import cli
from tests.benchmarks import server

#: What the installed program does.
HELENA = "from helena_cli.__main__ import main; main()"

#: The way Helena makes its Typer app: with Typer's defaults the help is drawn in boxes.
PLAIN = "rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False"


def help_seconds(runs: int) -> dict[str, float]:
    """Program → CPU seconds of its `--help`, the median of `runs`."""
    codes = {
        "helena --help": HELENA,
        "empty Typer app, plain help": _empty_app(PLAIN),
        "empty Typer app, Typer's defaults": _empty_app(""),
    }
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    # The first start of each compiles and reads files, and does not count.
    for run in range(runs + 1):
        for name, code in codes.items():
            cpu = _cpu_seconds([sys.executable, "-c", code, "--help"])
            if run:
                seconds[name].append(cpu)
    return {name: statistics.median(values) for name, values in seconds.items()}


def status_seconds(admin: str, runs: int) -> float:
    """Seconds of `helena status` with a database that answers, the median of `runs`."""
    seconds = []
    with (
        server.database(admin) as dsn,
        tempfile.TemporaryDirectory(prefix="helena-", dir="/tmp") as state,
    ):
        environ = {**os.environ, "HELENA_DSN": dsn, "HELENA_STATE_DIR": state}
        for _ in range(runs + 1):
            seconds.append(_seconds([sys.executable, "-c", HELENA, "status"], environ))
    return statistics.median(seconds[1:])


def _empty_app(options: str) -> str:
    """A program with as many commands as Helena has, which do nothing."""
    count = len(cli.app.registered_commands) + len(cli.app.registered_groups)
    commands = "".join(
        f"@app.command('command-{n}', short_help='Do the work number {n}.')\n"
        f"def command_{n}() -> None: ...\n"
        for n in range(count)
    )
    return f"import typer\napp = typer.Typer({options})\n{commands}app()"


def _cpu_seconds(command: Sequence[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def _seconds(command: Sequence[str], environ: Mapping[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
