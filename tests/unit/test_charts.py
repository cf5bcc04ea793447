"""The charts of the live view: what a column stands for, and what is unknown."""

import pytest

from helena_cli.batch.ledger import FlushRecord, Queue
from helena_cli.cli.charts import (
    ASCII_BARS,
    COLUMN_SECONDS,
    KEPT_COLUMNS,
    History,
    Series,
    draw,
    sparkline,
)

START = 1_700_000_000.0


def queue(insert: int = 0, update: int = 0, message: int = 0) -> Queue:
    return Queue(insert, update, message, insert + update + message, None, 0, 0)


def series(history: History, now: float) -> dict[str, Series]:
    return {one.name: one for one in history.series(now)}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([0, 0], "▁▁"),
        ([0, 1, 1000], "▁▂█"),
        ([None, 7, None], " █ "),
        ([1, 2, 3, 4, 5, 6, 7], "▂▃▄▅▆▇█"),
    ],
)
def test_a_bar_tells_the_share_of_the_largest_and_little_is_more_than_nothing(
    values: list[float | None], shown: str
):
    assert sparkline(values) == shown


def test_bars_can_be_had_in_ascii():
    assert sparkline([0, 5, 10], ASCII_BARS) == "_=#"


def test_a_column_keeps_the_most_that_waited_in_its_time():
    history = History()
    for number, waiting in enumerate((3, 9, 1)):
        history.add(queue(insert=waiting, message=2), [], START + number)
    history.add(queue(insert=4), [], START + COLUMN_SECONDS)
    found = series(history, START + COLUMN_SECONDS)
    assert found["insert"] == Series("insert", (9, 4), 4)
    assert found["message"] == Series("message", (2, 0), 0)


def test_throughput_is_what_the_flushes_wrote_in_their_time():
    history = History()
    flushes = [FlushRecord(START + 1, 100, 90, 0.1), FlushRecord(START + 12, 300, 300, 0.1)]
    history.add(queue(), flushes, START + 15)
    found = series(history, START + 15)["operations/s"]
    assert found == Series("operations/s", (10.0, 30.0), 30.0)
    assert series(history, START + 40)["operations/s"].now == 0


def test_flush_time_is_that_of_the_slowest_and_of_none_where_none_was():
    history = History()
    history.add(
        queue(), [FlushRecord(START, 1, 1, 0.25), FlushRecord(START + 1, 1, 1, 0.125)], START + 2
    )
    history.add(queue(), [], START + COLUMN_SECONDS)
    found = series(history, START + COLUMN_SECONDS)["flush time"]
    assert (found.values, found.now) == ((250.0, None), 125.0)


def test_a_flush_that_failed_took_no_time_and_wrote_nothing():
    history = History()
    history.add(queue(), [FlushRecord(START, 0, 0, 5.0, "away")], START)
    found = series(history, START)
    assert (found["flush time"].values, found["flush time"].now) == ((None,), None)
    assert found["operations/s"].values == (0,)


def test_a_day_takes_no_more_room_than_what_can_be_shown():
    history = History()
    for number in range(1000):
        history.add(queue(number), [], START + number * COLUMN_SECONDS)
    assert len(series(history, START + 999 * COLUMN_SECONDS)["insert"].values) == KEPT_COLUMNS


def test_a_clock_that_was_set_back_spoils_nothing():
    history = History()
    history.add(queue(1), [], START + 5000)
    history.add(queue(2), [], START)
    assert series(history, START)["insert"].values == (2,)
    assert series(history, START - 100)["insert"].values == ()


def test_a_rate_below_one_is_not_nothing():
    history = History()
    history.add(queue(), [FlushRecord(START, 4, 4, 0.1)], START)
    line = next(line.plain for line in draw(history.series(START), 80) if "/s" in line.plain)
    assert line.split()[-2:] == ["0.4", "0.4"]


def test_now_is_never_more_than_the_most():
    history = History()
    flushes = [FlushRecord(START + seconds, 100, 100, 0.1) for seconds in (8, 12)]
    history.add(queue(), flushes, START + 12)
    line = next(line.plain for line in draw(history.series(START + 12), 80) if "/s" in line.plain)
    assert line.split()[-2:] == ["20", "20"]


def test_charts_need_some_room():
    history = History()
    history.add(queue(1), [], START)
    assert draw(history.series(START), 43) == []
    assert {line.cell_len for line in draw(history.series(START), 44)} == {44}
    assert draw((), 80) == []
