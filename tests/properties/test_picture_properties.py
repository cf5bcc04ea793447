"""Whatever there is to show, the live view fits into the terminal."""

import io
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from helena_cli.batch.ledger import FlushRecord, Lane, Queue
from helena_cli.cli import render
from helena_cli.cli.checks import Check
from helena_cli.cli.picture import compose
from helena_cli.cli.seen import Seen
from helena_cli.documents.watch_state import DocumentChange, WatchedRoot, WatchState

TEXT = st.text(max_size=100)
COUNT = st.integers(0, 10**9)
TIME = st.floats(0, 4e9)
MAYBE = st.none() | TEXT
MAYBE_TIME = st.none() | TIME


def many(records: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(records, max_size=8).map(tuple)


SEEN = st.builds(
    Seen,
    target=TEXT,
    queue=st.builds(Queue, COUNT, COUNT, COUNT, COUNT, MAYBE_TIME, COUNT, COUNT),
    lanes=many(
        st.builds(Lane, TEXT, COUNT, MAYBE, st.none(), MAYBE, MAYBE_TIME, MAYBE_TIME, COUNT)
    ),
    flusher=st.none() | COUNT,
    flusher_running=st.booleans(),
    flusher_here=st.booleans(),
    silence=st.none() | st.floats(60, 1e9),
    flushes=many(st.builds(FlushRecord, TIME, COUNT, COUNT, st.floats(0, 1e6), MAYBE)),
    watch=st.builds(
        WatchState,
        roots=many(
            st.builds(WatchedRoot, TEXT, st.sampled_from(["events", "polling", "away"]), TEXT)
        ),
        settling=COUNT,
        changes=many(
            st.builds(DocumentChange, TIME, TEXT, st.sampled_from(["new", "missing", "failed"]))
        ),
        last_full=MAYBE_TIME,
        failure=MAYBE,
    ),
    checks=many(
        st.builds(
            Check,
            TEXT,
            st.sampled_from(["ok", "warn", "critical", "unknown"]),
            st.none(),
            st.none(),
            TEXT,
            MAYBE,
        )
    ),
    trouble=MAYBE,
)


@settings(max_examples=40, deadline=None)
@given(seen=SEEN, width=st.integers(24, 200), height=st.integers(3, 60))
def test_every_picture_fits_into_its_terminal(seen: Seen, width: int, height: int):
    lines = compose(seen, Console(file=io.StringIO(), width=width, height=height))
    assert len(lines) < height
    assert all(line.cell_len <= width for line in lines)
    # Nothing that comes from outside moves the cursor.
    assert all(render.plain(line.plain) == line.plain for line in lines)
