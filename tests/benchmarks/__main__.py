"""Runs all benchmarks and prints their tables as Markdown."""

import argparse
import os
import platform
import sys

import psycopg

from tests.benchmarks import callers, documents, memory, operations, server


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="rows for the ways of writing")
    parser.add_argument("--documents", type=int, default=5_000, help="Markdown files")
    parser.add_argument("--queue", type=int, default=1_000_000, help="the longer of two queues")
    parser.add_argument("--runs", type=int, default=3, help="rounds; the median counts")
    options = parser.parse_args()
    with server.server() as admin:
        with psycopg.connect(admin) as connection:
            version = connection.info.parameter_status("server_version")
        print(f"{os.cpu_count()} cores, Python {platform.python_version()}, PostgreSQL {version}")
        for batch in (100, 1000):
            print_operations(operations.measure(admin, options.rows, batch, options.runs), batch)
        print_callers(callers.measure(admin, options.rows))
        print_documents(documents.measure(admin, options.documents, options.runs), options)
        print_memory(admin, options.queue)


def print_operations(rates: dict[str, float], batch: int) -> None:
    """One line for each way of writing."""
    print(f"\n| batches of {batch:,} | rows/s | of plain COPY | x connection per operation |")
    print("|---|---:|---:|---:|")
    copy, slow = rates["plain COPY"], rates["connection per operation"]
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / copy:.2f} | {rate / slow:.0f} |")
    sys.stdout.flush()


def print_callers(held: dict[str, callers.Held]) -> None:
    """How long a script is held up by each call."""
    print("\n| call | median | 99th percentile | per operation |\n|---|---:|---:|---:|")
    for name, one in held.items():
        print(
            f"| {name} | {one.median:,.0f} µs | {one.p99:,.0f} µs | {one.per_operation:,.0f} µs |"
        )
    sys.stdout.flush()


def print_documents(seconds: dict[str, float], options: argparse.Namespace) -> None:
    """The plain loop, Helena, and Helena again."""
    print(f"\n| {options.documents:,} documents | seconds | documents/s | of the plain loop |")
    print("|---|---:|---:|---:|")
    names = {"plain": "plain loop", "helena": "helena process-pending", "again": "again, unchanged"}
    for key, name in names.items():
        rate, share = options.documents / seconds[key], seconds["plain"] / seconds[key]
        print(f"| {name} | {seconds[key]:.2f} | {rate:,.0f} | {share:.2f} |")
    sys.stdout.flush()


def print_memory(admin: str, count: int) -> None:
    """Two queues, one ten times as long as the other."""
    print("\n| queued operations | peak memory |\n|---|---:|")
    for queue in (count // 10, count):
        print(f"| {queue:,} | {memory.peak(admin, queue):.0f} MiB |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
