"""The five guarantees and the criteria of success, each with what was measured."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil
from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.proof.race import Figures
from helena_cli.proof.step import Step
from helena_cli.proof.steps import FILES
from helena_cli.proof.trial import WAIT, Trial
from helena_cli.settings import CheckSettings

#: Operations that are queued to see what they cost in memory, and the bytes allowed for them.
QUEUED = 2000
ALLOWED_BYTES = 10 * 1024 * 1024 * QUEUED // 1000

#: Seconds that a flush may take after its time has come.
FLUSH = 1.0


class Promise(Struct, frozen=True):
    """A guarantee or criterion; kept None: it could not be measured."""

    name: str
    kept: bool | None
    measured: str
    limit: str


class Lone:
    """One operation that nothing hurries, beside everything else: how long until it is there.

    A context manager; at its end it is given up.
    """

    _ROW: Mapping[str, str] = {
        "id": "lone",
        "sender": "helena test",
        "message_type": "TEST",
        "content": "nothing hurries this one",
    }

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.interval = trial.interval
        self._seconds: float | None = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="helena-test-lone")

    def __enter__(self) -> "Lone":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        self._thread.join()

    def wait(self) -> float | None:
        """Seconds from acceptance to commit; None when it never came."""
        while self._thread.is_alive():
            self._thread.join(WAIT)
        return self._seconds

    def _run(self) -> None:
        # An error means that it is not there: that is the answer, and the steps say why.
        with suppress(HelenaError), self._trial.runtime("lone") as runtime:
            table = self._trial.scratch.table("messages")
            with self._trial.session("test lone") as session:
                started = time.monotonic()
                runtime.engine.add_operation("message", table, self._ROW)
                while time.monotonic() < started + self.interval + 10:
                    if session.rows("messages", "id", ["lone"]):
                        self._seconds = time.monotonic() - started
                        return
                    if self._given_up.wait(0.02):
                        return


def memory(trial: Trial) -> int:
    """Bytes by which this process grew while operations were queued."""
    process, row = psutil.Process(os.getpid()), {"file_path": "memory", "title": "x" * 500}
    with trial.runtime("memory") as runtime:
        spool = runtime.spool
        table = trial.scratch.table(FILES)
        start = process.memory_info().rss
        for _ in range(QUEUED):
            spool.append("message", table, row)
        return max(0, int(process.memory_info().rss) - int(start))


def guarantees(
    lone: float | None, interval: float, grown: int, figures: Figures, steps: Sequence[Step]
) -> Iterator[Promise]:
    """What Helena promises for this database."""
    seconds = "never" if lone is None else f"{lone:.2f} s"
    yield Promise(
        "written within the interval",
        lone is not None and lone <= interval + FLUSH,
        seconds,
        f"{interval:g} s + flush",
    )
    rate = figures.operations_per_second
    yield Promise("throughput", rate >= 500, f"{rate:,.0f} operations/s", "500 operations/s")
    most = figures.connections_at_once
    yield Promise("connections", most <= 3, f"{most} at one time", "3 for the whole host")
    per_thousand = grown / QUEUED * 1000 / 1024 / 1024
    yield Promise(
        "memory", grown <= ALLOWED_BYTES, f"{per_thousand:.1f} MiB per 1,000", "10 MiB per 1,000"
    )
    killed = next(step for step in steps if step.name == "killed process")
    yield Promise("durability", killed.passed, killed.detail, "nothing lost, nothing doubled")


def criteria(figures: Figures, response_ms: float, checks: CheckSettings) -> Iterator[Promise]:
    """When the database may be called healthy under Helena's load."""
    longest = figures.longest_query_seconds
    limit = checks.longest_query_seconds
    yield Promise("no long query", longest <= limit, f"{longest:.2f} s", f"{limit:g} s")
    yield Promise(
        "response time",
        response_ms <= checks.response_ms,
        f"{response_ms:.1f} ms",
        f"{checks.response_ms:g} ms",
    )
    rate, least = figures.operations_per_second, checks.operations_per_second
    yield Promise(
        "throughput", rate >= least, f"{rate:,.0f} operations/s", f"{least:g} operations/s"
    )
    yield Promise(
        "no exhausted pool",
        figures.connections_at_once <= 3,
        f"{figures.connections_at_once} at one time",
        "3",
    )
    pages, most = figures.gin_pending_pages, figures.gin_limit_pages
    measured = "pgstattuple is not there" if pages is None else f"at most {pages}"
    kept = None if pages is None else pages <= most
    yield Promise("small GIN pending lists", kept, measured, f"{most} pages")


def response_ms(trial: Trial) -> float:
    """The median of a few answers to a trivial question, in milliseconds."""
    taken: list[Any] = []
    for _ in range(9):
        started = time.perf_counter()
        trial.scratch.ask("SELECT 1 AS one")
        taken.append((time.perf_counter() - started) * 1000)
    return float(sorted(taken)[4])
