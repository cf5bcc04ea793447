"""How long things took is counted once, kept in the spool, and told by any process."""

import math
import multiprocessing
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helena_cli.batch import histogram, identity, salvage
from helena_cli.batch.flush import Outcome
from helena_cli.batch.histogram import BOUNDS, COMMIT_DELAY, FLUSH, Histogram
from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from tests.spools import Clock

NOW = 1_700_000_000.0


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.spool"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    with closing(Spool.open(path)) as spool:
        yield spool


def accepted(age: float) -> int:
    """The id of an operation that was accepted so many seconds ago."""
    return round((NOW - age) * 1_000_000)


def record_delays(spool: Spool, *ages: float) -> None:
    """Record a flush that wrote operations of these ages, the oldest first."""
    due = [accepted(age) for age in ages]
    outcome = Outcome("target", written=tuple(due))
    spool.record(FlushRecord(NOW, 1, 1, 0.02), histogram.of_delays(NOW, due, outcome))


def seen(histogram: Histogram) -> dict[float, int]:
    """Bound → how many were added by it."""
    counts = [count for _, count in histogram.buckets]
    before = [0, *counts]
    return {
        bound: count - less
        for (bound, count), less in zip(histogram.buckets, before, strict=False)
        if count > less
    }


# What is counted


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, 0.005), (0.005, 0.005), (0.0051, 0.01), (30.0, 30.0), (30.1, math.inf)],
)
def test_flush_is_counted_below_the_first_bound_that_it_kept(
    spool: Spool, seconds: float, bound: float
):
    spool.record(FlushRecord(NOW, 1, 1, seconds))
    flushes = spool.report().histograms[FLUSH]
    assert seen(flushes) == {bound: 1}
    assert flushes.sum == seconds


def test_flush_that_failed_is_not_counted(spool: Spool):
    spool.record(FlushRecord(NOW, 0, 0, 9.0, "no answer"))
    assert spool.report().histograms[FLUSH].buckets[-1] == (math.inf, 0)


def test_delay_is_the_time_from_acceptance_to_the_commit(spool: Spool):
    record_delays(spool, 4000.0, 5.5, 5.4, 0.2, 0.0)
    delays = spool.report().histograms[COMMIT_DELAY]
    assert seen(delays) == {86_400.0: 1, 5.5: 2, 0.25: 1, 0.05: 1}
    assert delays.sum == pytest.approx(4011.1)


def test_buckets_grow_towards_the_last_one_which_holds_all(spool: Spool):
    record_delays(spool, 100_000.0, 7.0, 0.01)
    record_delays(spool, 7.0)
    delays = spool.report().histograms[COMMIT_DELAY]
    bounds = [bound for bound, _ in delays.buckets]
    counts = [count for _, count in delays.buckets]
    assert bounds == sorted(bounds) == list(BOUNDS[COMMIT_DELAY])
    assert counts == sorted(counts)
    assert delays.buckets[-1] == (math.inf, 4)


def test_bisection_counts_as_counting_one_by_one_would():
    noise = random.Random(7)
    for _ in range(100):
        ages = sorted(
            (10 ** noise.uniform(-3, 6) for _ in range(noise.randrange(60))), reverse=True
        )
        due = [accepted(age) for age in ages]
        bins = histogram.of_delays(NOW, due, Outcome("target", written=tuple(due)))
        delays = [NOW - identifier / 1e6 for identifier in due]
        above = -math.inf
        for bound in BOUNDS[COMMIT_DELAY]:
            here = [delay for delay in delays if above < delay <= bound]
            found = [b for b in bins if b.bound == bound]
            assert [b.observed for b in found] == ([len(here)] if here else [])
            # A sum of times since 1970 is good to a few microseconds for each.
            assert [b.seconds for b in found] == pytest.approx(
                [sum(here)] if here else [], abs=1e-3
            )
            above = bound


def test_only_what_the_database_has_is_counted():
    due = [accepted(age) for age in (50.0, 40.0, 3.0, 2.0, 0.5)]
    outcome = Outcome(
        "target",
        written=(due[4],),
        coalesced=(due[3],),
        skipped=(due[2],),
        held=(Verdict(due[1], "23503", "no parent"),),
        dead=(Verdict(due[0], "23505", "duplicate"),),
    )
    bins = histogram.of_delays(NOW, due, outcome)
    assert {b.bound: b.observed for b in bins} == {0.5: 1, 2.5: 1, 5.0: 1}


def test_clock_that_was_set_back_makes_no_delay_negative(spool: Spool):
    record_delays(spool, -3600.0)
    delays = spool.report().histograms[COMMIT_DELAY]
    assert seen(delays) == {0.05: 1}
    assert delays.sum == 0.0


def test_flusher_counts_the_delay_of_what_it_wrote(state_dir: Path):
    from helena_cli.batch.cycle import Cycle, Policy
    from tests.unit.test_cycle import ScriptedWriter, write_all

    clock = Clock()
    with closing(Spool.open(state_dir / "cycle.spool", clock=clock)) as spool:
        cycle = Cycle(spool, ScriptedWriter(write_all), Policy(), clock=clock)
        spool.append("insert", "t", {"a": 1})
        clock.now += 5.2
        spool.append("insert", "t", {"a": 2})
        assert cycle.turn(force=True)
        cycle.close()
        report = spool.report()
        assert seen(report.histograms[COMMIT_DELAY]) == {0.05: 1, 5.5: 1}
        assert report.histograms[FLUSH].buckets[-1][1] == report.flushes.count == 1


# Where it is kept


def test_counts_outlive_the_process_that_made_them(path: Path):
    with closing(Spool.open(path)) as spool:
        record_delays(spool, 1.0)
        before = spool.report().histograms
    with closing(Spool.open(path)) as spool:
        assert spool.report().histograms == before
        record_delays(spool, 1.0)
        assert seen(spool.report().histograms[COMMIT_DELAY]) == {1.0: 2}


def _record_fifty(path: Path) -> None:
    with closing(Spool.open(path)) as spool:
        for _ in range(50):
            record_delays(spool, 6.0, 0.3)


def test_counts_of_several_processes_add_up(spool: Spool, path: Path):
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_record_fifty, args=(path,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    report = spool.report()
    assert seen(report.histograms[COMMIT_DELAY]) == {6.0: 100, 0.5: 100}
    assert report.histograms[FLUSH].buckets[-1] == (math.inf, 100)


def test_spool_of_an_earlier_version_learns_to_count(path: Path):
    with closing(Spool.open(path)) as spool:
        spool.append("insert", "t", {"a": 1})
        known = spool.id
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE histograms")
        connection.execute("PRAGMA user_version = 2")
    with closing(Spool.open(path)) as spool:
        record_delays(spool, 1.0)
        assert (spool.id, spool.queue().total) == (known, 1)
        assert seen(spool.report().histograms[COMMIT_DELAY]) == {1.0: 1}


def test_repair_keeps_the_counts(path: Path):
    with closing(Spool.open(path)) as spool:
        record_delays(spool, 6.0, 0.3)
        before = spool.report().histograms
    salvage.rebuild(path, NOW)
    with closing(Spool.open(path)) as spool:
        assert spool.report().histograms == before


def test_repair_of_an_earlier_version_keeps_the_queue(path: Path):
    with closing(Spool.open(path)) as spool:
        spool.append("insert", "t", {"a": 1})
        known = spool.id
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE histograms")
    salvage.rebuild(path, NOW)
    with closing(Spool.open(path)) as spool:
        assert (spool.id, spool.queue().total) == (known, 1)
        assert spool.report().histograms[FLUSH].sum == 0.0


def test_repair_leaves_the_tables_of_an_earlier_version_where_they_are(path: Path):
    with closing(Spool.open(path)) as spool:
        spool.extend(("insert", "t", {"a": "x" * 1000}) for _ in range(100))
        assert spool.queue().total == 100
    with closing(sqlite3.connect(path)) as connection:
        # As one that was made without it, and learnt it later.
        connection.execute("DROP TABLE histograms")
        connection.execute("DROP TABLE consumed")
        connection.execute("CREATE TABLE elsewhere AS SELECT data FROM operations LIMIT 9")
        connection.execute(identity.CONSUMED)
        connection.execute("DROP TABLE elsewhere")
    with closing(Spool.open(path)) as spool:
        spool.accept_file("/inbox/a.json", "digest", [])
    salvage.rebuild(path, NOW)
    with closing(Spool.open(path)) as spool:
        assert spool.accepted_files("/inbox") == ["/inbox/a.json"]


def test_bounds_of_another_release_count_below_the_next_of_ours(path: Path):
    with closing(Spool.open(path)) as spool:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("INSERT INTO histograms VALUES ('flush', 0.7, 3, 2.0)")
        flushes = spool.report().histograms[FLUSH]
    assert seen(flushes) == {1.0: 3}
    assert flushes.sum == 2.0
