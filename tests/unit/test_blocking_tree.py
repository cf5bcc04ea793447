"""The tree of who waits for whom: complete, and readable on a narrow terminal."""

import re
import sys

import pytest

from helena_cli.cli.blocking_tree import print_tree
from helena_cli.cli.relief_report import print_plan
from helena_cli.database.blocking import Look, Session
from helena_cli.database.relief import Scope, make_plan
from tests.unit.test_relief import ALTER, readers, session
from tests.unit.test_render import Terminal


def shown(*sessions, monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> list[str]:
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    print_tree(make_plan(Look.of(sessions), Scope()))
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def test_each_waits_below_the_last_one_that_it_waits_for(monkeypatch):
    lines = shown(
        session(1, query="LOCK TABLE goods"),
        session(2, 1, awaits=ALTER, query="ALTER TABLE goods", waited=61.0),
        *readers(1, 2),
        monkeypatch=monkeypatch,
    )
    assert lines[0] == "1 me, idle in transaction for 1 min  ← terminate"
    assert lines[1] == "LOCK TABLE goods"
    assert lines[2] == "└── 2 me, waits 1 min for AccessExclusiveLock on goods"
    assert lines[4].startswith("    └── 20 sessions wait up to 0.0 s for AccessShareLock on goods:")
    pids = " ".join(lines[4:])
    assert all(str(pid) in pids for pid in range(100, 120))


def test_who_waits_for_two_is_shown_once_and_names_the_other(monkeypatch):
    lines = shown(session(1), session(2), session(3, 1, 2), monkeypatch=monkeypatch)
    assert [line for line in lines if " 3 me" in line] == [
        "└── 3 me, waits - for AccessShareLock on goods (and waits for 1)"
    ]


def test_a_long_queue_stays_within_the_screen_and_is_complete(monkeypatch):
    chain = [session(1), *(session(n, *range(1, n), awaits=ALTER) for n in range(2, 1200))]
    lines = shown(*chain, monkeypatch=monkeypatch)
    assert max(map(len, lines)) <= 80
    found = {int(pid) for line in lines for pid in re.findall(r"(\d+) me,", line)}
    assert found == set(range(1, 1200))


def test_a_circle_is_named_and_does_not_hang(monkeypatch, capsys):
    lines = shown(session(1), session(2, 1), session(3, 4), session(4, 3), monkeypatch=monkeypatch)
    assert any("2 me" in line for line in lines)
    assert "These wait for each other: 3, 4" in capsys.readouterr().err


def test_what_a_query_says_moves_no_cursor(monkeypatch):
    lines = shown(
        session(1, query="SELECT '\x1b[2J[/x]'\n  , 2"), session(2, 1), monkeypatch=monkeypatch
    )
    assert lines[1] == "SELECT '[2J[/x]' , 2"


def test_a_prepared_transaction_has_the_name_that_one_would_type(monkeypatch):
    prepared = Session(pid=None, gid="it's 17", user="me", state="prepared", may_end=True)
    lines = shown(prepared, session(1, "it's 17"), monkeypatch=monkeypatch)
    assert lines[0] == "'it''s 17' me, prepared for -  ← rollback prepared"


@pytest.mark.parametrize("may_end", [True, False])
def test_the_plan_says_whose_a_prepared_transaction_is_and_how_to_keep_it(monkeypatch, may_end):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    prepared = Session(pid=None, gid="it's 17", user="me", state="prepared", may_end=may_end)
    plan = make_plan(Look.of([prepared, session(1, "it's 17")]), Scope())
    print_plan(plan, (), advisory=0)
    _, about = re.split("Plan|Left alone", screen.getvalue())
    assert "me, prepared for -" in about
    assert "17' me" not in about
    assert "COMMIT PREPARED 'it''s 17';" in about
    assert "it\\'s" not in screen.getvalue()


def test_who_hides_its_query_takes_no_line_for_it(monkeypatch):
    crowd = [session(n, 1, query="") for n in (2, 3)]
    lines = shown(session(1, query=""), *crowd, monkeypatch=monkeypatch)
    assert len(lines) == 2
    assert all(lines)
