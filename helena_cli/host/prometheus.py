"""The numbers of a spool as Prometheus wants them: names, types and units by its conventions.

At any moment: accepted = written + coalesced + dropped + dead letters + queued operations.
"""

import math
from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from helena_cli.batch.histogram import COMMIT_DELAY, FLUSH, Histogram
from helena_cli.batch.report import Report


class Figures(Collector):
    """Asked at each scrape; it keeps nothing."""

    def __init__(
        self,
        report: Callable[[], Report],
        flusher_running: Callable[[], bool],
        health: Callable[[], str | None],
        version: str,
    ) -> None:
        self._report = report
        self._flusher_running = flusher_running
        self._health = health
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """All metrics, of one snapshot of the spool."""
        report = self._report()
        yield InfoMetricFamily("helena_build", "The release.", {"version": self._version})
        yield from _operations(report)
        yield from _queue(report)
        yield from _flushes(report)
        running = self._flusher_running()
        yield _gauge("helena_flusher_running", "Whether some process writes.", running)
        yield _gauge("helena_healthy", "What /healthz says.", self._health() is None)


def _operations(report: Report) -> Iterator[Metric]:
    books = report.conservation
    for name, text, value in (
        ("accepted", "Operations that were queued.", books.accepted),
        ("written", "Operations that the database has, by a row of their own.", books.written),
        ("coalesced", "Operations that went into the row of another one.", books.coalesced),
        ("dropped", "Dead letters that a person deleted.", books.dropped),
        ("lost", "Operations that the repair of a spool could not bring back.", report.lost),
    ):
        yield CounterMetricFamily(f"helena_operations_{name}", text, value)
    yield _gauge("helena_dead_letters", "Operations that were refused.", books.dead)


def _queue(report: Report) -> Iterator[Metric]:
    queue = report.queue
    waiting = GaugeMetricFamily(
        "helena_queue_operations", "Operations that wait to be written.", labels=["kind"]
    )
    for kind in ("insert", "update", "message"):
        waiting.add_metric([kind], getattr(queue, kind))
    yield waiting
    age = queue.oldest_seconds or 0.0
    yield _gauge("helena_queue_oldest_seconds", "How long the oldest one has waited.", age)
    yield _gauge("helena_spool_bytes", "Bytes of the spool in use.", queue.spool_bytes)
    yield _gauge("helena_waiting_tables", "Tables that cannot be written now.", report.waiting)


def _flushes(report: Report) -> Iterator[Metric]:
    flushes = report.flushes
    for name, text, value in (
        ("helena_flushes", "Flushes that succeeded.", flushes.count),
        ("helena_flush_failures", "Flushes that failed, to be tried again.", flushes.failures),
        ("helena_flush_rows", "Rows sent to the database.", flushes.rows),
    ):
        yield CounterMetricFamily(name, text, value)
    last = flushes.last
    if last is not None:
        yield _gauge("helena_last_flush_timestamp_seconds", "When the last one ended.", last.at)
        text = "Whether the last one succeeded."
        yield _gauge("helena_last_flush_success", text, last.error is None)
    if report.flusher is not None:
        text = "The last sign of life of the process that writes."
        yield _gauge("helena_flusher_heartbeat_timestamp_seconds", text, report.flusher.heartbeat)
    for name, text in (
        (FLUSH, "How long a flush took that succeeded."),
        (COMMIT_DELAY, "From the acceptance of an operation to the commit that holds it."),
    ):
        yield _histogram(f"helena_{name}_seconds", text, report.histograms[name])


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets = [
        ("+Inf" if bound == math.inf else str(bound), float(count))
        for bound, count in histogram.buckets
    ]
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)
