"""JSON text from other programs: what a line becomes, and what becomes of a bad one."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from helena_cli.batch.intake import CHUNK, ESCAPED, Lines, Rejection, read_object
from helena_cli.batch.operation import encode
from helena_cli.errors import InvalidOperation, SpoolFull

LIMIT = 1000


class Queue:
    """Keeps what it is given; takes so many at most."""

    def __init__(self, room: int = 10**9) -> None:
        self.chunks: list[list[bytes]] = []
        self.room = room

    def extend(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
        chunk = [encode(*operation, max_bytes=LIMIT) for operation in operations]
        if len(self.rows) + len(chunk) > self.room:
            raise SpoolFull("The queue is full.", remedy="Wait.")
        self.chunks.append(chunk)
        return list(range(len(chunk)))

    @property
    def rows(self) -> list[bytes]:
        return [row for chunk in self.chunks for row in chunk]


class Desk:
    """Lines with their queue and what was rejected."""

    def __init__(self, room: int = 10**9) -> None:
        self.queue = Queue(room)
        self.rejected: list[Rejection] = []
        self.lines = Lines(self.queue, "insert", "t", max_bytes=LIMIT, reject=self.rejected.append)

    def feed(self, *blocks: bytes) -> "Desk":
        for block in blocks:
            self.lines.feed(block)
        self.lines.end()
        return self


def row(number: int) -> bytes:
    return b'{"n":%d}' % number


def test_each_line_is_an_operation():
    desk = Desk().feed(b'{"a": 1, "b": "\xc3\xbc"}\n{"a": [true, null]}\n')
    assert desk.queue.rows == ['{"a":1,"b":"ü"}'.encode(), b'{"a":[true,null]}']
    assert (desk.lines.accepted, desk.rejected) == (2, [])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_lines_are_the_same_however_they_come(size: int):
    text = b'\xef\xbb\xbf{"n":0}\r\n\n   \n{"n":1}\n{"x":\n{"n":2}'
    desk = Desk().feed(*(text[start : start + size] for start in range(0, len(text), size)))
    assert desk.queue.rows == [row(0), row(1), row(2)]
    assert [rejection.line for rejection in desk.rejected] == [5]


def test_a_line_is_accepted_as_soon_as_it_is_complete():
    desk = Desk()
    desk.lines.feed(b'{"n":0}\n{"n"')
    assert desk.queue.rows == [row(0)]
    desk.lines.feed(b":1}\n")
    assert desk.queue.rows == [row(0), row(1)]


def test_the_last_line_needs_no_end():
    assert Desk().feed(row(1)).queue.rows == [row(1)]


def test_nothing_is_nothing():
    desk = Desk().feed(b"", b"\n\n")
    assert (desk.queue.rows, desk.lines.accepted, desk.rejected) == ([], 0, [])


def test_many_lines_are_accepted_in_chunks():
    count = 2 * CHUNK + 1
    desk = Desk().feed(b"\n".join(map(row, range(count))))
    assert desk.queue.rows == [row(number) for number in range(count)]
    assert max(map(len, desk.queue.chunks)) == CHUNK
    assert desk.lines.accepted == count


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b"{", "data", "it is not valid JSON"),
        (b"{} {}", "data", "it is not valid JSON"),
        (b"[1]", "data", "it is JSON, but not an object"),
        (b'"text"', "data", "it is JSON, but not an object"),
        (b"{}", "data", "at least one column"),
        (b'{"a": NaN}', "data", "it is not valid JSON"),
        (b'{"a": "\xff"}', "data", "it is not UTF-8"),
        (b'{"a": "\\ud800\\ud800"}', "data", "it is not valid JSON"),
        (b'{"a": 1e99999999999999999999}', "data", "a number is too long"),
        (b'{"a": {"b": "x\\u0000"}}', "a.b", "NUL"),
        (b'{"a": "' + b"x" * LIMIT + b'"}', "data", "the limit is 1,000 bytes"),
        (b"[" * 5000, "data", "it is nested too deeply"),
    ],
)
def test_a_bad_line_is_rejected_and_its_neighbours_are_accepted(
    line: bytes, field: str, reason: str
):
    desk = Desk().feed(b"\n".join([row(1), line, row(3)]))
    assert desk.queue.rows == [row(1), row(3)]
    (rejection,) = desk.rejected
    assert (rejection.line, rejection.field) == (2, field)
    assert reason in rejection.reason


def test_a_line_that_is_too_long_is_not_kept():
    desk = Desk()
    for _ in range(100):
        desk.lines.feed(b"x" * LIMIT)
        assert sum(map(len, desk.lines._parts)) <= LIMIT * ESCAPED
    desk.feed(b"\n" + row(2))
    assert desk.queue.rows == [row(2)]
    (rejection,) = desk.rejected
    assert rejection.line == 1
    assert "the line is longer than 6,000 bytes" in rejection.reason


def test_numbers_keep_all_of_their_digits():
    text = b'{"a":1.10,"b":123456789012345678901234567890,"c":0.1234567890123456789,"d":-0.0}'
    assert encode("insert", "t", read_object(text), max_bytes=LIMIT) == text


def test_what_was_accepted_before_the_queue_was_full_is_counted():
    desk = Desk(room=CHUNK)
    with pytest.raises(SpoolFull):
        desk.feed(b"\n".join(map(row, range(CHUNK + 1))) + b"\n")
    assert desk.lines.accepted == CHUNK


@pytest.mark.parametrize(("kind", "table"), [("delete", "t"), ("insert", ""), ("insert", "a.b.c")])
def test_a_kind_or_table_that_no_line_could_have_is_refused_at_once(kind: str, table: str):
    with pytest.raises(InvalidOperation) as caught:
        Lines(Queue(), kind, table, max_bytes=LIMIT, reject=lambda _: None)
    assert caught.value.field in ("kind", "table")


def test_json_of_another_program_is_read():
    value = {"text": "a\nb\t🎉", "list": [1, 2.5], "none": None}
    assert read_object(json.dumps(value, indent=2).encode()) == value
