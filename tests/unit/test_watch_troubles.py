"""What cannot be read is tried again, then said once, and taken back when it is over."""

import logging
from pathlib import Path

import pytest

from helena_cli.documents import watch_troubles
from helena_cli.documents.outbox import Failure
from helena_cli.documents.watch_troubles import Problems, Troubles
from helena_cli.errors import HelenaError

FAR = 1e12


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.md"
    path.write_text("# A")
    return str(path)


def test_a_file_is_tried_some_times_before_it_is_reported(file: str, caplog):
    troubles = Troubles()
    failure = Failure(file, "Permission denied")
    for _ in watch_troubles.RETRIES:
        assert troubles.note([failure], lambda path: True) == []
        assert troubles.next_due() is not None
        assert troubles.due(FAR) == [file]
    assert caplog.messages == []

    assert troubles.note([failure], lambda path: True) == [failure]

    assert caplog.messages == [f"{file}: Permission denied"]
    assert troubles.first() == f"{file}: Permission denied"
    assert troubles.due(FAR) == []
    # Not again for the same reason.
    assert troubles.note([failure], lambda path: True) == []
    assert len(caplog.messages) == 1


def test_what_was_in_another_folder_of_the_same_name_is_not_tried_again(file: str):
    troubles = Troubles()
    beside = f"{Path(file).parent}-2/b.md"
    troubles.note([Failure(file, "I/O error"), Failure(beside, "I/O error")], lambda path: True)
    troubles.forget(Path(file).parent)

    assert troubles.due(FAR) == [beside]


def test_it_is_over_when_a_look_at_it_succeeded(file: str, caplog):
    troubles = Troubles()
    for _ in range(len(watch_troubles.RETRIES) + 1):
        troubles.note([Failure(file, "Permission denied")], lambda path: True)

    troubles.note([], lambda path: False)
    assert troubles.first() is not None
    troubles.note([], lambda path: path == file)

    assert troubles.first() is None
    assert caplog.messages[-1] == f"{file}: that is over."


def test_a_folder_is_reported_at_once(tmp_path: Path):
    troubles = Troubles()
    failure = Failure(str(tmp_path), "Permission denied")

    assert troubles.note([failure], lambda path: True) == [failure]
    assert troubles.next_due() is None


def test_a_document_with_a_row_is_no_trouble(file: str, caplog):
    failures = [Failure(f"{file}{n}", "broken front matter", indexed=True) for n in range(12)]
    troubles = Troubles()

    assert troubles.note(failures, lambda path: True) == []
    assert troubles.first() is None
    watch_troubles.say(failures)

    assert len(caplog.messages) == watch_troubles.NAMED + 1
    assert "2 more" in caplog.messages[-1]


def test_a_problem_is_said_when_it_comes_and_when_it_goes(caplog):
    caplog.set_level(logging.INFO)
    problems = Problems()
    error = HelenaError("It is away.", remedy="Wait.")
    problems.note("The database", error)
    problems.note("The database", error)
    assert problems.first() == "It is away. Wait."
    problems.clear("The database")
    problems.clear("The database")

    assert caplog.messages == ["It is away. Wait.", "The database: that is over."]
    assert problems.first() is None
