"""Runs the benchmarks and prints their tables as Markdown."""

import argparse
import os
import platform
from collections.abc import Callable, Iterable, Sequence

import psycopg

from tests.benchmarks import (
    backlog,
    callers,
    commands,
    documents,
    held,
    hot_keys,
    load,
    memory,
    operations,
    server,
)

#: Operations to one flush, and rows to one statement of the other ways.
BATCH = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", type=_parts, default=[*PARTS], help=f"of these, some: {','.join(PARTS)}")
    add("--rows", type=int, default=10_000, help="rows for the ways of writing")
    add("--held", type=int, default=1_000_000, help="rows of the table that is not empty")
    add("--added", type=int, default=100_000, help="rows that are written into it, and into none")
    add("--updates", type=int, default=100_000, help="updates of a thousand hot keys")
    add("--documents", type=int, default=5_000, help="Markdown files")
    add("--seconds", type=float, default=3, help="how long each kind of load lasts")
    add("--starts", type=int, default=20, help="how often a command is started")
    add("--queue", type=int, default=1_000_000, help="the longer of two queues")
    add("--runs", type=int, default=3, help="rounds; the median counts")
    options = parser.parse_args()
    # What is installed has its bytecode, and is not compiled anew at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with server.server() as admin:
        with psycopg.connect(admin) as connection:
            version = connection.info.parameter_status("server_version")
        print(f"{os.cpu_count()} cores, Python {platform.python_version()}, PostgreSQL {version}")
        for part in options.only:
            PARTS[part](admin, options)


def _parts(text: str) -> list[str]:
    """The names of parts in a list with commas."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}")
    return names


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text; each line as soon as it is known."""
    print(f"\n| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}", flush=True)
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def print_operations(admin: str, options: argparse.Namespace) -> None:
    """One line for each way of writing."""
    for batch in (100, BATCH):
        rates = operations.measure(admin, options.rows, batch, options.runs)
        copy, slow = rates["plain COPY"], rates["connection per operation"]
        _table(
            (f"batches of {batch:,}", "rows/s", "of plain COPY", "x connection per operation"),
            (
                (name, f"{rate:,.0f}", f"{rate / copy:.2f}", f"{rate / slow:.0f}")
                for name, rate in rates.items()
            ),
        )


def print_held(admin: str, options: argparse.Namespace) -> None:
    """The ways that matter, with the settings as they come, into an empty and a large table."""
    for held_rows in (0, options.held):
        rates = held.measure(admin, held_rows, options.added, options.runs)
        copy = next(iter(rates.values()))
        _table(
            (f"{options.added:,} rows into {held_rows:,}", "rows/s", "of plain COPY"),
            ((name, f"{rate:,.0f}", f"{rate / copy:.2f}") for name, rate in rates.items()),
        )


def print_hot_keys(admin: str, options: argparse.Namespace) -> None:
    """Coalescing against copying."""
    rates = hot_keys.measure(admin, options.updates, options.runs)
    _table(
        (f"{options.updates:,} updates of {hot_keys.KEYS:,} rows", "updates/s", "of plain COPY"),
        (
            (name, f"{rate:,.0f}", f"{rate / rates[hot_keys.COPY]:.2f}")
            for name, rate in rates.items()
        ),
    )


def print_callers(admin: str, options: argparse.Namespace) -> None:
    """How long a script is held up by each call."""
    _table(
        ("call", "median", "99th percentile", "per operation"),
        (
            (name, f"{one.median:,.0f} µs", f"{one.p99:,.0f} µs", f"{one.per_operation:,.0f} µs")
            for name, one in callers.measure(admin, options.rows).items()
        ),
    )


def print_documents(admin: str, options: argparse.Namespace) -> None:
    """The plain loop, Helena, and Helena again; and the least that a second run could do."""
    count, names = options.documents, {"plain": "plain loop", "helena": "helena process-pending"}
    names |= {"again": "again, unchanged", "scan": "bare scandir and stat"}
    seconds = documents.measure(admin, count, options.runs)
    plain, scan = seconds["plain"], seconds["scan"]
    _table(
        (f"{count:,} documents", "seconds", "documents/s", "of the plain loop", "x bare scan"),
        (
            (name, f"{one:.2f}", f"{count / one:,.0f}", f"{plain / one:.2f}", f"{one / scan:.1f}")
            for name, one in ((name, seconds[key]) for key, name in names.items())
        ),
    )


def print_load(admin: str, options: argparse.Namespace) -> None:
    """What each way of writing costs the server, then what it costs who reads meanwhile."""
    ways = load.measure(admin, options.seconds, options.runs)
    _table(
        ("who writes", "operations/s", "commits per operation", "WAL bytes per operation"),
        (
            (name, f"{one['rate']:,.0f}", f"{one['commits']:.4f}", f"{one['wal']:,.0f}")
            for name, one in ways.items()
            if one["rate"]
        ),
    )
    for query in ("by key", "by tags"):
        _table(
            (f"a reader {query}, meanwhile writes", "median", "99th percentile", "x idle"),
            (
                (name, f"{median:.2f} ms", f"{p99:.2f} ms", f"{times:.1f}")
                for name, one in ways.items()
                for median, p99, times in [
                    [one[f"{query} {figure}"] for figure in ("median", "p99", "times")]
                ]
            ),
        )


def print_commands(admin: str, options: argparse.Namespace) -> None:
    """How long a person waits."""
    helps = commands.help_seconds(options.starts)
    own = next(iter(helps.values()))
    _table(
        ("program", "CPU time", "helena takes"),
        ((name, f"{one * 1000:.0f} ms", f"{own / one:.2f}") for name, one in helps.items()),
    )
    seconds = commands.status_seconds(admin, max(1, options.starts // 2))
    _table(("command", "seconds"), [("helena status", f"{seconds:.2f}")])


def print_memory(admin: str, options: argparse.Namespace) -> None:
    """Two queues, one ten times as long as the other."""
    _table(
        ("queued operations", "peak memory"),
        (
            (f"{queue:,}", f"{memory.peak(admin, queue):.0f} MiB")
            for queue in (options.queue // 10, options.queue)
        ),
    )


def print_backlog(_admin: str, options: argparse.Namespace) -> None:
    """The longer queue, and a watcher that cannot write it."""
    last, peak = backlog.resident(options.queue)
    _table(
        ("operations queued in a watcher without a database", "memory", "peak"),
        [(f"{options.queue:,}", f"{last:.0f} MiB", f"{peak:.0f} MiB")],
    )


PARTS: dict[str, Callable[[str, argparse.Namespace], None]] = {
    "operations": print_operations,
    "held": print_held,
    "hot-keys": print_hot_keys,
    "callers": print_callers,
    "documents": print_documents,
    "load": print_load,
    "commands": print_commands,
    "memory": print_memory,
    "backlog": print_backlog,
}


if __name__ == "__main__":
    main()
