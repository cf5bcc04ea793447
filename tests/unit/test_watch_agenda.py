"""Paths settle, deletions have a time of grace, and folders are looked at as a whole in time."""

from pathlib import Path

from helena_cli.documents import watch_agenda
from helena_cli.documents.watch_agenda import Agenda
from helena_cli.settings import WatchSettings

SETTINGS = WatchSettings(settle=1.0, max_wait=3.0, grace=2.0)
DOCS = Path("/docs")


def agenda(present: set[str]) -> Agenda:
    return Agenda(SETTINGS, exists=present.__contains__)


def test_a_saved_path_is_looked_at_when_it_was_left_alone():
    waiting = agenda({"a"})
    waiting.touched("a", 10.0)

    assert waiting.take_paths(10.9) == []
    assert waiting.take_paths(11.0) == ["a"]


def test_a_path_that_is_gone_has_its_time_of_grace():
    waiting = agenda(set())
    waiting.touched("a", 10.0)

    assert waiting.take_paths(11.0) == []
    assert len(waiting) == 1
    assert waiting.take_paths(12.9) == []
    assert waiting.take_paths(13.0) == ["a"]


def test_a_link_whose_file_is_gone_has_its_time_of_grace_too(tmp_path: Path):
    waiting = Agenda(SETTINGS)
    link = tmp_path / "a.md"
    link.symlink_to("deleted.md")
    waiting.touched(str(link), 10.0)

    assert waiting.take_paths(11.0) == []
    assert waiting.take_paths(13.0) == [str(link)]


def test_lost_events_make_all_be_looked_at_and_believed():
    waiting = agenda(set())
    waiting.want(DOCS)
    assert waiting.folders(10.0) == {DOCS: False}
    waiting.done(DOCS)
    waiting.lost(DOCS, 10.0)

    assert waiting.folders(10.5) == {}
    assert waiting.folders(11.0) == {DOCS: True}
    waiting.want(DOCS)
    assert waiting.folders(11.0) == {DOCS: True}
    waiting.done(DOCS)
    assert waiting.folders(11.0) == {}


def test_when_folders_came_or_went_all_is_looked_at_after_what_settles():
    waiting = agenda(set())
    waiting.touched("/docs/sub", 10.0)
    waiting.stirred(DOCS, 10.0)

    assert waiting.folders(15.9) == {}
    assert waiting.folders(16.0) == {DOCS: False}


def test_folders_that_never_rest_do_not_put_it_off_for_ever():
    waiting = agenda(set())
    for second in range(0, 61):
        waiting.stirred(DOCS, float(second))

    assert waiting.folders(60.0) == {DOCS: False}


def test_too_many_paths_are_not_kept(monkeypatch):
    monkeypatch.setattr(watch_agenda, "LIMIT", 3)
    waiting = agenda(set())

    assert [waiting.touched(name, 1.0) for name in "abcd"] == [True, True, True, False]
    assert len(waiting) == 0


def test_it_says_when_there_is_something_to_do():
    waiting = agenda({"a"})
    assert waiting.next_due() is None
    waiting.stirred(DOCS, 10.0)
    waiting.touched("a", 10.0)

    assert waiting.next_due() == 11.0
    assert waiting.take_all_paths() == ["a"]
    assert waiting.next_due() == 16.0
