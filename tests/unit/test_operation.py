"""What an operation may hold, how it is written down, and what is refused at the call."""

import enum
import json
import math
import os
from collections import ChainMap, OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helena_cli.batch.operation import KINDS, Operation, encode
from helena_cli.errors import ExitCode, HelenaError, InvalidOperation

LIMIT = 8 * 1024 * 1024


def written(value: Any) -> str:
    """The JSON text of one value."""
    text = encode("insert", "t", {"c": value}, max_bytes=LIMIT).decode()
    assert text.startswith('{"c":')
    return text[len('{"c":') : -1]


def refused(
    kind: Any = "insert", table: Any = "t", data: Any = None, *, max_bytes: int = LIMIT
) -> InvalidOperation:
    """The refusal of an operation."""
    with pytest.raises(InvalidOperation) as caught:
        encode(kind, table, {"c": 1} if data is None else data, max_bytes=max_bytes)
    return caught.value


def refused_value(value: Any) -> InvalidOperation:
    return refused(data={"good": 1, "bad": value})


# Kind


@pytest.mark.parametrize("kind", ["insert", "update", "message"])
def test_each_queue_has_its_kind(kind):
    assert kind in KINDS
    assert encode(kind, "t", {"c": 1}, max_bytes=LIMIT) == b'{"c":1}'


@pytest.mark.parametrize(
    "kind", ["delete", "INSERT", "", " insert", None, 1, ["insert"], b"insert", float("nan")]
)
def test_unknown_kind_is_refused(kind):
    error = refused(kind=kind)
    assert error.field == "kind"
    assert "insert, update, message" in str(error)


def test_refusal_is_a_value_error_with_a_remedy_and_the_exit_code_of_wrong_usage():
    error = refused(kind="delete")
    assert isinstance(error, HelenaError)
    assert isinstance(error, ValueError)
    assert "Nothing was queued" in error.remedy
    assert error.exit_code is ExitCode.USAGE


# Table


@pytest.mark.parametrize(
    "table", ["t", "schema.t", "Mixed Case", "öffentlich.tabelle", "x" * 100, "_1"]
)
def test_table_is_a_name_or_schema_and_name(table):
    assert encode("insert", table, {"c": 1}, max_bytes=LIMIT)


@pytest.mark.parametrize("table", ["", " ", ".", "a.", ".a", "a. ", "a.b.c", "a..b", "a\0b"])
def test_table_without_a_usable_name_is_refused(table):
    assert refused(table=table).field == "table"


@pytest.mark.parametrize("table", [None, 5, b"t", ["t"], ("s", "t"), object()])
def test_table_that_is_not_text_is_refused(table):
    assert refused(table=table).field == "table"


def test_table_with_a_lone_surrogate_is_refused():
    assert refused(table="t\ud800").field == "table"


# Data


@pytest.mark.parametrize(
    "data", [{}, [], [("c", 1)], "c", b"c", 1, object(), MappingProxyType({}), UserDict()]
)
def test_data_that_gives_no_column_is_refused(data):
    assert refused(data=data).field == "data"


def test_no_data_at_all_is_refused():
    with pytest.raises(InvalidOperation) as caught:
        encode("insert", "t", None, max_bytes=LIMIT)
    assert caught.value.field == "data"


@pytest.mark.parametrize("column", ["", 1, None, b"c", ("c",), True, "a\0", "\ud800"])
def test_column_without_a_usable_name_is_refused(column):
    assert refused(data={"good": 1, column: 1}).field == "data"


class LazyRow(Mapping[str, Any]):
    """A mapping that is no dict."""

    def __getitem__(self, key: str) -> Any:
        return {"a": 1, "b": datetime(2026, 1, 1)}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "data",
    [
        {"a": 1},
        OrderedDict(a=1),
        MappingProxyType({"a": 1}),
        UserDict(a=1),
        ChainMap({}, {"a": 1}),
    ],
)
def test_any_mapping_is_data_and_a_value(data):
    assert encode("insert", "t", data, max_bytes=LIMIT) == b'{"a":1}'
    assert written(data) == '{"a":1}'


def test_mapping_of_the_callers_own_make_is_data():
    encoded = encode("insert", "t", LazyRow(), max_bytes=LIMIT)
    assert encoded == b'{"a":1,"b":"2026-01-01T00:00:00"}'


def test_caller_may_change_the_data_afterwards():
    data = {"tags": ["a"]}
    encoded = encode("insert", "t", data, max_bytes=LIMIT)
    data["tags"].append("b")
    assert encoded == b'{"tags":["a"]}'


def test_columns_are_read_back_each_still_encoded():
    encoded = encode("insert", "t", {"a": Decimal("1.10"), "b": None}, max_bytes=LIMIT)
    columns = Operation(1, "insert", "t", encoded).columns()
    assert {name: bytes(value) for name, value in columns.items()} == {"a": b"1.10", "b": b"null"}


# Size


def test_operation_may_be_as_large_as_the_limit_and_not_larger():
    overhead = len(b'{"c":""}')
    assert encode("insert", "t", {"c": "x" * (1000 - overhead)}, max_bytes=1000)
    error = refused(data={"c": "x" * (1001 - overhead)}, max_bytes=1000)
    assert error.field == "data"
    assert "1,001 bytes" in str(error)
    assert "1,000 bytes" in str(error)


def test_limit_counts_bytes_and_not_characters():
    assert refused(data={"c": "ü" * 600}, max_bytes=1000).field == "data"


# Text


@pytest.mark.parametrize("text", ["", "a", 'say "hi"', "back\\slash", "\n\t\x01", "ü € 🚀", "\x7f"])
def test_text_keeps_every_character(text):
    assert json.loads(written(text)) == text


@pytest.mark.parametrize("text", ["\0", "a\0b", "ü\0"])
def test_nul_is_refused(text):
    assert refused_value(text).field == "bad"
    assert refused_value({"k": text}).field == "bad.k"


def test_text_that_only_spells_the_escape_of_nul_is_kept():
    assert json.loads(written("\\u0000")) == "\\u0000"
    assert json.loads(written({"\\u0000": ["\\u0000"]})) == {"\\u0000": ["\\u0000"]}


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udcff"])
def test_lone_surrogate_is_refused(text):
    error = refused_value(text)
    assert error.field == "bad"
    assert "surrogate" in str(error)


@pytest.mark.parametrize("key", ["\ud800", "\0"])
def test_bad_character_in_a_nested_key_is_refused_and_the_column_named(key):
    assert refused_value({"k": [{key: 1}]}).field == "bad.k[0]"


class Label(str):
    __slots__ = ()


# The older way to say StrEnum; its str() is "Colour.RED".
Colour = enum.Enum("Colour", {"RED": "red"}, type=str)


class Stage(enum.StrEnum):
    NEW = "new"


@pytest.mark.parametrize(
    ("value", "text"), [(Label("x"), "x"), (Colour.RED, "red"), (Stage.NEW, "new")]
)
def test_subclass_of_text_is_its_text(value, text):
    assert json.loads(written(value)) == text
    assert json.loads(written({value: 1})) == {text: 1}
    assert json.loads(encode("insert", "t", {value: 1}, max_bytes=LIMIT)) == {text: 1}


# Numbers


@pytest.mark.parametrize(
    "number",
    [0, -1, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**100, -(10**100)],
)
def test_integer_keeps_every_digit(number):
    assert written(number) == str(number)


def test_integer_that_python_will_not_print_is_refused():
    assert refused_value(10**5000).field == "bad"
    assert refused_value({10**5000: 1}).field == "bad"


class Count(int):
    pass


class Level(enum.IntEnum):
    HIGH = 3


class Bits(enum.IntFlag):
    BOTH = 3


@pytest.mark.parametrize("value", [Count(3), Level.HIGH, Bits.BOTH])
def test_subclass_of_integer_is_its_number(value):
    assert written(value) == "3"


@pytest.mark.parametrize("value", [True, False, None])
def test_constants_are_json_constants(value):
    assert json.loads(written(value)) is value


@pytest.mark.parametrize("number", [0.5, -0.0, 1e300, 5e-324, 1e16, 0.1 + 0.2])
def test_float_keeps_its_value(number):
    read = json.loads(written(number))
    assert read == number
    assert math.copysign(1, read) == math.copysign(1, number)


class Measure(float):
    """As numpy.float64 is."""


def test_subclass_of_float_is_its_number():
    assert written(Measure(1.5)) == "1.5"
    assert refused_value(Measure("nan")).field == "bad"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_number_that_json_lacks_is_refused_at_any_depth(number):
    assert refused_value(number).field == "bad"
    assert refused_value([1, number]).field == "bad[1]"
    assert refused_value({"a": [{"b": (number,)}]}).field == "bad.a[0].b[0]"


@pytest.mark.parametrize("number", ["NaN", "sNaN", "-NaN123", "Infinity", "-Infinity"])
def test_decimal_that_json_lacks_is_refused(number):
    assert refused_value(Decimal(number)).field == "bad"
    assert refused_value({"a": Decimal(number)}).field == "bad.a"


@pytest.mark.parametrize(
    "number",
    ["1.10", "0.00", "-0.00", "1E+5", "1E-20", "123456789012345678901234567890.0123456789"],
)
def test_decimal_keeps_its_scale(number):
    assert written(Decimal(number)) == number


class Money(Decimal):
    pass


def test_subclass_of_decimal_keeps_its_scale():
    assert written(Money("1.10")) == "1.10"


# Times


def test_aware_time_becomes_utc():
    value = datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert written(value) == '"2026-02-28T23:30:00Z"'
    summer = datetime(2026, 7, 1, 12, 0, 0, 5, tzinfo=ZoneInfo("Europe/Berlin"))
    assert written(summer) == '"2026-07-01T10:00:00.000005Z"'
    assert written(datetime(2026, 1, 1, tzinfo=UTC)) == '"2026-01-01T00:00:00Z"'


def test_naive_time_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert written(datetime(2026, 3, 1, 1, 30)) == '"2026-03-01T01:30:00"'
    assert written(datetime(1, 1, 1)) == '"0001-01-01T00:00:00"'


class Nowhere(tzinfo):
    """A time zone that does not say its offset: Python calls such a time naive."""

    def utcoffset(self, _: datetime | None) -> timedelta | None:
        return None

    def dst(self, _: datetime | None) -> timedelta | None:
        return None

    def tzname(self, _: datetime | None) -> str | None:
        return None


def test_time_whose_zone_has_no_offset_is_naive(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert written(datetime(2026, 3, 1, tzinfo=Nowhere())) == '"2026-03-01T00:00:00"'


@pytest.mark.parametrize(
    "value",
    [
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_time_outside_the_calendar_in_utc_is_refused(value):
    assert refused_value(value).field == "bad"


class Stamp(datetime):
    """As pandas.Timestamp is."""


class Day(date):
    pass


class Clock(time):
    pass


class Span(timedelta):
    pass


class Key(UUID):
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (date(2026, 3, 1), "2026-03-01"),
        (Day(2026, 3, 1), "2026-03-01"),
        (time(1, 2, 3), "01:02:03"),
        (Clock(1, 2, 3), "01:02:03"),
        (Stamp(2026, 3, 1, 4), "2026-03-01T04:00:00"),
        (Stamp(2026, 3, 1, 4, tzinfo=UTC), "2026-03-01T04:00:00Z"),
        (timedelta(days=1, seconds=2), "P1DT2.000000S"),
        (timedelta(microseconds=-1), "P-1DT86399.999999S"),
        (Span(days=1, seconds=2), "P1DT2.000000S"),
        (UUID("12345678-1234-5678-1234-567812345678"), "12345678-1234-5678-1234-567812345678"),
        (Key("12345678-1234-5678-1234-567812345678"), "12345678-1234-5678-1234-567812345678"),
    ],
)
def test_days_times_and_uuids_are_text(value, text):
    assert json.loads(written(value)) == text


# Bytes and collections


@pytest.mark.parametrize(
    "value",
    [
        b"\x00\xff",
        bytearray(b"\x00\xff"),
        memoryview(b"\x00\xff"),
        type("B", (bytes,), {})(b"\x00\xff"),
    ],
)
def test_bytes_are_postgresqls_hex_text(value):
    assert json.loads(written(value)) == "\\x00ff"
    assert json.loads(written([value])) == ["\\x00ff"]


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize("value", [[1, 2], (1, 2), Point(1, 2), type("L", (list,), {})([1, 2])])
def test_sequences_are_arrays(value):
    assert written(value) == "[1,2]"


@pytest.mark.parametrize("value", [{"a", "b"}, frozenset({"a", "b"})])
def test_sets_are_arrays(value):
    assert sorted(json.loads(written(value))) == ["a", "b"]
    assert refused_value({"ok", "\0"}).field.startswith("bad[")


def test_integer_keys_become_text():
    assert written({1: "a", -2: {3: "b"}}) == '{"1":"a","-2":{"3":"b"}}'


@pytest.mark.parametrize("key", [None, True, 1.5, ("a",), b"a", date(2026, 1, 1)])
def test_other_keys_are_refused(key):
    assert refused_value({"k": {key: 1}}).field == "bad.k"


def test_keys_that_would_become_one_are_refused():
    error = refused_value({1: "a", "1": "b"})
    assert error.field == "bad"
    assert "'1'" in str(error)


def test_depth_beyond_reason_is_refused():
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    error = refused_value(value)
    assert error.field == "data"
    assert "nested" in str(error)
    # Freed level by level: the interpreter would otherwise recurse over it.
    while value:
        value = value.pop()


def test_value_that_contains_itself_is_refused():
    endless: dict[str, Any] = {}
    endless["self"] = endless
    assert refused_value(endless).field == "data"
    circle: list[Any] = []
    circle.append(circle)
    assert refused_value(circle).field == "data"


def test_reasonable_depth_is_accepted():
    value: Any = 1
    for _ in range(100):
        value = [{"k": value}]
    assert written(value).count("[") == 100


@dataclass
class Record:
    a: int = 1


class Choice(enum.Enum):
    YES = "yes"


@pytest.mark.parametrize(
    "value",
    [
        Record(),
        Choice.YES,
        object(),
        range(3),
        iter([1]),
        1j,
        os.curdir.__class__,
        {}.values(),
        ...,
    ],
)
def test_value_without_a_form_in_json_is_refused_by_its_type(value):
    error = refused_value(value)
    assert error.field == "bad"
    assert type(value).__name__ in str(error)
    assert refused_value([[value]]).field == "bad[0][0]"


# Everything at once

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0")), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_whatever_json_can_say_is_written_and_read_back_equal(value):
    assert json.loads(written(value)) == value


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.characters(categories=["Cs"])
    | st.binary()
    | st.decimals()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
    max_leaves=10,
)


@given(anything, st.text(max_size=3) | st.integers())
def test_anything_is_either_written_as_json_without_nul_or_refused_by_name(value, column):
    try:
        encoded = encode("insert", "t", {column: value}, max_bytes=LIMIT)
    except InvalidOperation as error:
        assert error.field == "data" or error.field.startswith(str(column))
    else:
        assert list(json.loads(encoded)) == [column]
        assert "\0" not in str(json.loads(encoded))
