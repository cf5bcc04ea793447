"""The live view of `helena watch`: what stands on the screen, and what never leaves it."""

import io
import re
import time
from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from rich.console import Console

from helena_cli.batch.ledger import FlushRecord, Lane, Queue
from helena_cli.cli.charts import ASCII_BARS, BARS, History
from helena_cli.cli.checks import Check
from helena_cli.cli.picture import compose
from helena_cli.cli.seen import Seen
from helena_cli.documents.watch_state import DocumentChange, WatchedRoot, WatchState

EMPTY = Queue(0, 0, 0, 0, None, 0, 0)
LONG = "The server said " + " ".join(f"word{number}" for number in range(60)) + "."


def at(clock: str) -> float:
    """The Unix time at which a clock on the wall shows this."""
    return time.mktime(time.strptime(f"2026-11-24 {clock}", "%Y-%m-%d %H:%M:%S"))


NOW = at("12:00:09")


def good(clock: str, operations: int = 120) -> FlushRecord:
    return FlushRecord(at(clock), operations, 100, 0.045)


def bad(clock: str, error: str = "connection refused.") -> FlushRecord:
    return FlushRecord(at(clock), 0, 0, 5.0, error)


def screen(seen: Seen, *, width: int = 80, height: int = 24, bars: str = BARS) -> list[str]:
    """The lines of a picture, which fit."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height)
    lines = compose(seen, console, bars=bars)
    assert len(lines) < height
    assert all(line.cell_len <= width for line in lines)
    console.print(*lines, sep="\n")
    printed = file.getvalue().splitlines()
    assert [line.rstrip() for line in printed] == [line.plain.rstrip() for line in lines]
    return [line.plain.rstrip() for line in lines]


def words(lines: Sequence[str]) -> str:
    """All that can be read, without the names on the left that folded text stands beside."""
    return re.sub(r"\s+", " ", " ".join(line[14:] for line in lines))


def history(seconds: int = 60) -> History:
    found = History()
    for second in range(seconds):
        now = NOW - seconds + second
        flushes = [FlushRecord(now, 50, 50, 0.03)] if second % 5 == 0 else []
        found.add(Queue(second, 0, 1, second + 1, 1.0, 0, 0), flushes, now)
    return found


QUIET = Seen(
    "postgresql://db/helena",
    EMPTY,
    flusher=7,
    flusher_running=True,
    flusher_here=True,
    flushes=(good("12:00:05"), good("12:00:00", 1)),
    series=history().series(NOW),
    watch=WatchState(
        roots=(WatchedRoot("/home/me/notes", "events"),),
        changes=(DocumentChange(at("12:00:04"), "ideas/a.md", "changed"),),
        last_full=at("11:50:00"),
    ),
    checks=(Check("pool", "ok", 1, 97, "fine"), Check("gin_pending", "unknown", None, None, "?")),
)


def test_everything_at_a_glance():
    assert screen(QUIET) == [
        "Helena writes to postgresql://db/helena         Ctrl-C writes the rest and stops",
        "Waiting                                       the last 7 min       now      most",
        "insert                                               ▁▂▃▅▆▇█        59        59",
        "update                                               ▁▁▁▁▁▁▁         0         0",
        "message                                              ███████         1         1",
        "operations/s                                         ▅█████▅         5        10",
        "flush time                                           ███████   30.0 ms   30.0 ms",
        "Queue         0 operations, nothing waits",
        "Flusher       this process",
        "Dead letters  none",
        "Last flushes  12:00:05    120 operations      100 rows     45.0 ms",
        "              12:00:00       1 operation      100 rows     45.0 ms",
        "Documents     12:00:04  changed  ideas/a.md",
        "Folders       1 folder, all looked at 11:50:00",
        "              events   /home/me/notes",
        "Checks        1 ok, 1 unknown (gin_pending)",
    ]


TROUBLE = replace(
    QUIET,
    queue=Queue(1, 2, 3, 6, 4000.0, 4, 0),
    lanes=(
        Lane("events", 2, LONG, "42P01", "Create the table.", at("11:00:00"), NOW, 3),
        Lane("free", 1, None, None, None, None, None, 0),
        Lane("audit.log", 7, LONG, "42P01", "Create the table.", at("10:00:00"), NOW, 3),
    ),
    flushes=(bad("12:00:08"), bad("12:00:01"), good("11:59:00")),
    watch=WatchState(
        roots=(
            WatchedRoot("/media/usb", "away", "it is not mounted"),
            WatchedRoot("/mnt/nfs", "polling", "a network tells of no changes"),
        ),
        changes=(DocumentChange(at("12:00:03"), "deep/" * 20 + "secret.md", "failed"),),
        failure="the database is away",
    ),
    checks=(
        Check("longest_query", "critical", 40, 10, "it is long", "Look who runs it."),
        Check("queue_age", "critical", 4000, 60, "the oldest is old", "Look at the tables."),
        Check("dead_letters", "warn", 4, 0, "the database refused 4", "List them."),
        Check("pool", "ok", 1, 97, "fine"),
    ),
)

MUST = (
    "6 operations, the oldest 1 h 6 min old",
    "4; helena dead-letters list says why; then retry or drop them",
    "the folders: the database is away",
    "2 tries since 12:00:01, the last 12:00:08: connection refused. The operations stay queued",
    "/media/usb: it is not mounted",
    f"events, audit.log (9 operations, since 10:00:00): {LONG}; what to do: Create the table.",
    "longest_query: it is long; what to do: Look who runs it.",
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_what_a_person_must_act_on_is_never_cut_off(width: int):
    shown = words(screen(TROUBLE, width=width, height=70))
    for text in MUST:
        assert text in shown
    assert "deep/" * 20 + "secret.md" in shown.replace(" ", "")


def test_what_a_person_must_act_on_pushes_out_the_rest():
    lines = screen(TROUBLE)
    assert all(text in words(lines) for text in MUST)
    assert not any(line.startswith(("operations/s", "Documents")) for line in lines)
    assert any(line.startswith("operations/s") for line in screen(TROUBLE, height=40))


def test_a_screen_that_is_too_small_says_so_and_where_the_rest_is():
    lines = screen(TROUBLE, height=12)
    assert lines[1].startswith("Queue")
    assert "more lines of this; helena status shows all" in lines[-1]
    assert not any("more lines" in line for line in screen(TROUBLE))


def test_without_room_for_charts_the_kinds_are_told_in_words():
    lines = screen(replace(QUIET, queue=Queue(1, 2, 3, 6, 1.0, 0, 0)), height=8)
    assert lines[1] == "Waiting       1 insert, 2 update, 3 message"


def test_what_the_view_shows_itself_is_not_repeated_as_a_check():
    assert words(screen(TROUBLE, height=60)).count("refused") == 1


@pytest.mark.parametrize(
    ("changes", "label", "text"),
    [
        ({"flusher_running": False, "flusher_here": False}, "Flusher", "none is running"),
        ({"flusher_here": False}, "Flusher", "process 7"),
        (
            {"flusher_running": False, "queue": Queue(1, 0, 0, 1, 1.0, 0, 0)},
            "warn",
            "no process of this host writes the queue",
        ),
        (
            {"silence": 120.0},
            "critical",
            "the flusher gave no sign of life for 2 min; if it hangs, end it:",
        ),
        ({"trouble": "The queue is away."}, "critical", "The queue is away."),
        (
            {"watch": WatchState(roots=(WatchedRoot("/n", "polling", "too few"),), settling=3)},
            "Folders",
            "1 folder, not looked at yet, 3 paths settling",
        ),
        (
            {"watch": WatchState(roots=(WatchedRoot("/n", "polling", "too few"),))},
            "",
            "polling  /n: too few",
        ),
    ],
)
def test_it_says(changes: dict[str, object], label: str, text: str):
    assert f"{label:14}{text}" in screen(replace(QUIET, **changes))


def test_one_cause_is_told_once_with_what_to_do():
    seen = replace(
        TROUBLE,
        flushes=(bad("12:00:08", "The database is away"),),
        watch=WatchState(failure="The database is away. Start it."),
    )
    shown = words(screen(seen, height=60))
    assert shown.count("The database is away") == 1
    assert "The database is away. Start it. The operations stay queued" in shown
    assert "the oldest is old" not in shown
    flowing = replace(TROUBLE, flushes=())
    assert "queue_age: the oldest is old; what to do: Look" in words(screen(flowing, height=60))


def test_old_failures_are_over_with_the_next_flush_that_succeeds():
    seen = replace(QUIET, flushes=(good("12:00:05"), bad("12:00:00")))
    assert "flush failed" not in "\n".join(screen(seen))


def test_a_document_stays_on_one_line_and_keeps_the_end_of_its_path():
    paths = ["a/" * 60 + "end.md", "深い/" * 30 + "終.md", "x\x1b[2J\ny.md"]
    changes = tuple(DocumentChange(NOW, path, "new") for path in paths)
    lines = screen(replace(QUIET, watch=WatchState(changes=changes)))
    shown = [line for line in lines if "12:00:09  new" in line]
    assert len(shown) == 3
    assert shown[0].endswith("/a/end.md")
    assert shown[1].endswith("深い/終.md")
    assert shown[2].endswith("x[2J y.md")


def test_flushes_and_documents_share_the_room():
    flushes = tuple(good("12:00:05") for _ in range(50))
    changes = tuple(DocumentChange(NOW, f"{n}.md", "new") for n in range(50))
    seen = replace(QUIET, flushes=flushes, watch=replace(QUIET.watch, changes=changes))
    lines = screen(seen, height=41)
    assert len(lines) == 40
    counts = [sum(text in line for line in lines) for text in ("rows", "  new ")]
    assert abs(counts[0] - counts[1]) <= 1


def test_a_flush_keeps_its_time_on_a_narrow_terminal():
    assert "Last flushes  12:00:05    120 operations     45.0 ms" in screen(QUIET, width=52)


def test_many_folders_leave_room_and_are_counted():
    roots = tuple(WatchedRoot(f"/home/me/{number}", "events") for number in range(30))
    lines = screen(replace(QUIET, watch=WatchState(roots=roots)))
    assert "              ... 28 more lines" in lines


def test_a_terminal_without_unicode_gets_other_bars():
    assert "\n".join(screen(QUIET, bars=ASCII_BARS)).isascii()


def test_severity_is_told_in_words_and_colours():
    console = Console(file=io.StringIO(), width=80, height=40)
    styles = {line.plain[:8].strip(): str(line.style) for line in compose(TROUBLE, console)}
    assert (styles["critical"], styles["table wa"]) == ("bold red", "yellow")
