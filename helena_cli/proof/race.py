"""Before and after: the same rows the old way and through Helena, and a reader meanwhile."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from typing import Any

from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.proof.steps import DOCUMENTS
from helena_cli.proof.trial import WAIT, Trial

#: Real-time writers at one time.
WRITERS = 4

#: Seconds between two looks at the server.
LOOK_EVERY = 0.05

_WAITING = """\
SELECT count(*) FILTER (WHERE wait_event_type = 'Lock') AS waiting,
       coalesce(max(extract(epoch FROM clock_timestamp() - query_start))
                FILTER (WHERE state = 'active'), 0)::float8 AS longest
  FROM pg_stat_activity WHERE application_name LIKE 'helena %%'"""

#: What somebody would look for while others write.
_READ = "SELECT count(*) FROM {} WHERE tags @> ARRAY['tag-7']"


class Figures(Struct, frozen=True):
    """What one way of writing costs; None where the server does not tell."""

    operations: int
    seconds: float
    operations_per_second: float
    commits_per_operation: float
    wal_bytes_per_operation: float | None
    connections_opened: int
    connections_at_once: int
    lock_waits: int
    gin_pending_pages: int | None
    #: How long the server lets such a list become.
    gin_limit_pages: int
    longest_query_seconds: float
    reader_median_ms: float
    reader_p99_ms: float


class Wrote(Struct, frozen=True):
    """How the rows got in."""

    commits: int
    connections_opened: int
    connections_at_once: int


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows like those of real documents."""
    return [
        {
            "es_index": "helena_test",
            "es_doc_id": f"race-{n:07}",
            "doc_type": "general_documentation",
            "issuer": f"issuer {n % 53}",
            "filename": f"document-{n:07}.md",
            "file_size": 2048 + n % 1000,
            "sha256": f"{n:064x}",
            "investigation_id": f"investigation-{n % 31}",
            "tags": ["markdown", f"tag-{n % 211}", f"topic-{n % 17}"],
            "metadata": {
                "title": f"Document {n}",
                "preview": "A few words. " * 10,
                "lines": n % 400,
            },
        }
        for n in range(count)
    ]


def before(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> Figures:
    """A connection and a commit for each operation, several writers at once."""
    return _measure(trial, rows, _real_time)


def after(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> Figures:
    """`add_operation` for each, by as many threads, until all are committed."""
    return _measure(trial, rows, _through_helena)


def _real_time(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> Wrote:
    from helena_cli.database.scratch import upsert

    table = trial.scratch.table(DOCUMENTS)

    def write(row: Mapping[str, Any]) -> None:
        with closing(trial.connect("test before")) as connection:
            upsert(connection, table, [row])

    _in_threads(write, rows)
    return Wrote(len(rows), len(rows), WRITERS)


def _through_helena(trial: Trial, rows: Sequence[Mapping[str, Any]]) -> Wrote:
    table = trial.scratch.table(DOCUMENTS)
    with trial.runtime("race") as runtime:
        engine = runtime.engine
        _in_threads(lambda row: engine.add_operation("insert", table, row), rows)
        runtime.drain()
        flushes = runtime.spool.flushes().count
        return Wrote(flushes, len(runtime.connections), runtime.most)


def _in_threads(
    write: Callable[[Mapping[str, Any]], object], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the rows, some at one time; an interrupt ends it."""
    stop = threading.Event()

    def work(part: Sequence[Mapping[str, Any]]) -> None:
        for row in part:
            if stop.is_set():
                return
            write(row)

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="helena-test") as threads:
        try:
            writing = {threads.submit(work, rows[n::WRITERS]) for n in range(WRITERS)}
            while writing:
                done, writing = wait(writing, WAIT, FIRST_EXCEPTION)
                for one in done:
                    one.result()
        finally:
            stop.set()


def _measure(
    trial: Trial,
    rows: Sequence[Mapping[str, Any]],
    way: Callable[[Trial, Sequence[Mapping[str, Any]]], Wrote],
) -> Figures:
    scratch = trial.scratch
    scratch.empty(DOCUMENTS)
    with _watching(trial) as watch:
        wal, started = _wal(trial), time.perf_counter()
        wrote = way(trial, rows)
        seconds = time.perf_counter() - started
        now = _wal(trial)
    if scratch.count(DOCUMENTS) != len(rows):
        raise HelenaError(
            f"{scratch.count(DOCUMENTS)} of {len(rows)} rows were written.",
            remedy="Look at the log of the server.",
        )
    latencies = sorted(watch.latencies) or [0.0]
    return Figures(
        operations=len(rows),
        seconds=seconds,
        operations_per_second=len(rows) / seconds,
        commits_per_operation=wrote.commits / len(rows),
        wal_bytes_per_operation=None if wal is None or now is None else (now - wal) / len(rows),
        connections_opened=wrote.connections_opened,
        connections_at_once=wrote.connections_at_once,
        lock_waits=watch.waiting,
        gin_pending_pages=watch.pending,
        gin_limit_pages=scratch.pending_limit(),
        longest_query_seconds=watch.longest,
        reader_median_ms=statistics.median(latencies),
        reader_p99_ms=latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))],
    )


def _wal(trial: Trial) -> int | None:
    """Bytes of write-ahead log so far, of the whole server."""
    query = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8 AS bytes"
    try:
        return int(trial.scratch.ask(query)[0]["bytes"])
    except HelenaError:
        return None


class _Watch:
    """Two threads beside the writers: one reads as a user would, one looks at the server."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._done = threading.Event()
        self.latencies: list[float] = []
        self.waiting = 0
        self.longest = 0.0
        self.pending: int | None = None

    def read(self) -> None:
        """Note how long a look-up takes, again and again, in milliseconds."""
        with self._trial.session("test reader") as session:
            query = _READ.format(self._trial.scratch.table(DOCUMENTS))
            while not self._done.is_set():
                started = time.perf_counter()
                session.ask(query)
                self.latencies.append((time.perf_counter() - started) * 1000)
                self._done.wait(0.005)

    def look(self) -> None:
        """Note the most sessions that waited, the longest query and the longest pending list."""
        with self._trial.session("test observer") as session:
            ended = False
            while not ended:
                # Once more at the end, or a short run would not have been looked at.
                ended = self._done.wait(LOOK_EVERY)
                row = session.ask(_WAITING)[0]
                self.waiting = max(self.waiting, row["waiting"])
                self.longest = max(self.longest, row["longest"])
                pages = session.pending_pages(DOCUMENTS)
                if pages is not None:
                    self.pending = max(self.pending or 0, pages)

    def end(self) -> None:
        """Let both threads end."""
        self._done.set()


@contextmanager
def _watching(trial: Trial) -> Iterator[_Watch]:
    watch = _Watch(trial)
    with ThreadPoolExecutor(2, thread_name_prefix="helena-test-watch") as threads:
        try:
            watching = [threads.submit(watch.read), threads.submit(watch.look)]
            yield watch
        finally:
            watch.end()
    for one in watching:
        one.result()
