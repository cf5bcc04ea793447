"""The four records: what may be left out, what is refused and how that is said."""

import enum
import inspect
import math
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest

from helena_cli.batch import records
from helena_cli.batch.operation import encode
from helena_cli.batch.records import Triple
from helena_cli.errors import InvalidOperation

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

Builder = Callable[[Any, datetime], Triple]

#: Each builder with the least that it needs.
LEAST: Mapping[str, tuple[Builder, dict[str, Any]]] = {
    "document reference": (records.document_reference, {"es_doc_id": "a"}),
    "message": (records.message, {"sender": "a", "content": "b"}),
    "agent context": (
        records.agent_context,
        {"agent_name": "a", "project_id": "", "context_key": "c", "context_value": {"n": 1}},
    ),
    "document usage": (records.document_usage, {"es_doc_id": "a", "accessed_by": "b"}),
}
builders = pytest.mark.parametrize(("build", "least"), LEAST.values(), ids=list(LEAST))


def refusal(build: Builder, data: Any) -> InvalidOperation:
    with pytest.raises(InvalidOperation) as caught:
        build(data, NOW)
    assert "Nothing was queued" in caught.value.remedy
    return caught.value


def row(build: Builder, **data: Any) -> dict[str, Any]:
    return dict(build(data, NOW)[2])


# Defaults


def test_a_document_reference_is_an_insert_with_the_usual_defaults():
    assert records.document_reference({"es_doc_id": "a"}, NOW) == (
        "insert",
        "es_document_references",
        {
            "es_doc_id": "a",
            "es_index": "osint_reports_pdf",
            "doc_type": "document",
            "data_classification": "public",
            "indexed_at": NOW,
            "tags": [],
            "metadata": {},
        },
    )


def test_a_message_is_appended_with_an_id_of_its_own():
    kind, table, message = records.message({"sender": "a", "content": "b"}, NOW)
    assert (kind, table) == ("message", "messages")
    identifier = message["id"]
    assert str(UUID(identifier)) == identifier
    assert message == {
        "id": identifier,
        "sender": "a",
        "recipient": "Team",
        "message_type": "NOTIFICATION",
        "content": "b",
        "context": {},
        "timestamp": NOW,
        "importance": 0.5,
    }
    assert records.message({"sender": "a", "content": "b"}, NOW)[2]["id"] != identifier


def test_an_agent_context_is_an_insert_that_knows_its_time():
    _, least = LEAST["agent context"]
    triple = ("insert", "agent_contexts", {**least, "updated_at": NOW})
    assert records.agent_context(least, NOW) == triple


def test_each_use_of_a_document_is_a_row_of_its_own():
    _, least = LEAST["document usage"]
    triple = ("insert", "es_document_usage_log", {**least, "access_timestamp": NOW})
    assert records.document_usage(least, NOW) == triple


def test_what_is_given_goes_before_the_defaults():
    given = {
        "id": "m1",
        "sender": "a",
        "recipient": "b",
        "message_type": "ALERT",
        "content": "",
        "context": ["list"],
        "timestamp": datetime(2020, 1, 1),
        "importance": Decimal("0.9"),
        "project_id": "p",
        "requires_response": False,
        "response_to": "m0",
        "tags": ["x"],
    }
    assert records.message(given, NOW)[2] == given


def test_none_takes_the_default_and_is_null_where_there_is_none():
    reference = row(
        records.document_reference, es_doc_id="a", tags=None, doc_type=None, issuer=None
    )
    assert (reference["tags"], reference["doc_type"], reference["issuer"]) == ([], "document", None)
    message = row(records.message, sender="a", content="b", id=None, importance=None, tags=None)
    assert UUID(message["id"])
    assert (message["importance"], message["tags"]) == (0.5, None)


def test_what_is_left_out_and_has_no_default_is_not_mentioned():
    # An existing row then keeps it.
    assert "issuer" not in row(records.document_reference, es_doc_id="a")


def test_the_callers_mapping_is_left_as_it_was():
    data = {"sender": "a", "content": "b"}
    records.message(data, NOW)
    assert data == {"sender": "a", "content": "b"}


def test_columns_come_in_one_order_so_that_rows_of_a_kind_go_together():
    declared = list(records.Message.__annotations__)
    columns = list(row(records.message, content="b", sender="a"))
    assert columns[:2] == ["content", "sender"]
    assert columns[2:] == sorted(columns[2:], key=declared.index)


@builders
def test_a_record_can_be_queued(build: Builder, least: dict[str, Any]):
    assert encode(*build(least, NOW), max_bytes=10_000)


@pytest.mark.parametrize(
    "fields",
    [
        records.DocumentReference,
        records.Message,
        records.AgentContext,
        records.DocumentUsage,
    ],
)
def test_every_field_is_explained_and_says_when_it_is_required(fields: type):
    source = [line.strip() for line in inspect.getsource(fields).splitlines()]
    required = vars(fields)["__required_keys__"]
    for name in fields.__annotations__:
        (number,) = (n for n, line in enumerate(source) if line.startswith(f"{name}: "))
        explained = source[number - 1]
        assert explained.startswith("#: ") and explained.endswith(".")
        assert ("Required" in explained) == (name in required)


# What is refused


@builders
def test_each_required_field_is_missed_when_it_is_absent_or_none(
    build: Builder, least: dict[str, Any]
):
    for field in least:
        without = {name: value for name, value in least.items() if name != field}
        for data in (without, {**least, field: None}):
            error = refusal(build, data)
            assert error.field == field
            assert f"{field}: it is required" in str(error)


@builders
def test_an_unknown_field_is_refused_and_the_nearest_named(build: Builder, least: dict[str, Any]):
    field = next(iter(least))
    misspelt = field[:-1]
    error = refusal(build, {**least, misspelt: "x"})
    assert error.field == misspelt
    assert f"Did you mean {field!r}?" in str(error)
    assert field in error.remedy
    assert "add_operation" in error.remedy
    assert "Did you mean" not in str(refusal(build, {**least, "qqqqqq": "x"}))


@builders
@pytest.mark.parametrize("data", [None, "text", [("sender", "a")], 7])
def test_only_a_mapping_is_a_record(build: Builder, least: dict[str, Any], data: Any):
    assert refusal(build, data).field == "data"


def test_a_key_that_is_no_text_is_refused():
    assert refusal(records.message, {"sender": "a", "content": "b", 1: 2}).field == "1"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("metadata", '{"pages": 3}', "it is JSON: give the mapping or list itself, not text"),
        ("metadata", b"{}", "not bytes"),
        ("metadata", 7, "it must be a mapping or a list, not int"),
        ("tags", "one,two", "it must be a list of texts, not text"),
        ("tags", {"a": 1}, "it must be a list of texts, not dict"),
        ("tags", ["a", 1], "each tag must be text, not int"),
        ("tags", ["a", None], "each tag must be text, not NoneType"),
        ("es_doc_id", 17, "it must be text, not int"),
        ("es_doc_id", " ", "it is empty"),
        ("filename", b"a.pdf", "it must be text, not bytes"),
        ("file_size", "17", "it must be a whole number, not text"),
        ("file_size", True, "it must be a whole number, not bool"),
        ("file_size", 1.5, "it must be a whole number, not float"),
        ("indexed_at", 1_700_000_000, "it must be a datetime, or its text in ISO 8601, not int"),
        ("indexed_at", "yesterday", "'yesterday' is not a time in ISO 8601"),
        ("data_classification", "secret", "one of public, confidential, internal, restricted"),
        ("data_classification", ["public"], "is not one of"),
    ],
)
def test_a_value_that_does_not_fit_a_document_reference_is_refused(
    field: str, value: Any, reason: str
):
    error = refusal(records.document_reference, {"es_doc_id": "a", field: value})
    assert error.field == field
    assert str(error).startswith(f"The document reference was refused: {field}: ")
    assert reason in str(error)


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (records.message, "context", "{}"),
        (records.message, "importance", "0.5"),
        (records.message, "importance", True),
        (records.message, "requires_response", 1),
        (records.message, "response_to", ""),
        (records.message, "id", ""),
        (records.message, "content", {"text": "b"}),
        (records.agent_context, "context_value", "text"),
        (records.agent_context, "importance", "high"),
        (records.document_usage, "results_count", 2.0),
        (records.document_usage, "response_time_ms", "12"),
        (records.document_usage, "session_id", 12),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(build: Builder, field: str, value: Any):
    least = next(least for other, least in LEAST.values() if other is build)
    assert refusal(build, {**least, field: value}).field == field


# What is accepted


class Level(enum.StrEnum):
    INTERNAL = "internal"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tags", ("a",)),
        ("tags", {"a"}),
        ("tags", frozenset({"a"})),
        ("metadata", []),
        ("metadata", {"at": NOW}),
        ("es_doc_id", uuid4()),
        ("data_classification", Level.INTERNAL),
        ("indexed_at", date(2026, 1, 2)),
        ("file_size", 0),
    ],
)
def test_a_value_that_fits_is_stored_as_it_is(field: str, value: Any):
    assert row(records.document_reference, **{"es_doc_id": "a", field: value})[field] == value


@pytest.mark.parametrize("value", [{}, [], 0, 1.5, False, [None], {"a": {"b": "c"}}])
def test_an_agent_remembers_any_json_but_bare_text(value: Any):
    least = {**LEAST["agent context"][1], "context_value": value}
    assert records.agent_context(least, NOW)[2]["context_value"] == value


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("2026-01-02T03:04:05+02:00", "2026-01-02T01:04:05Z"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("2026-01-02 03:04:05.25", "2026-01-02T03:04:05.250000"),
        ("2026-01-02", "2026-01-02T00:00:00"),
    ],
)
def test_a_time_as_text_keeps_its_meaning_in_utc(text: str, stored: str):
    triple = records.message({"sender": "a", "content": "b", "timestamp": text}, NOW)
    assert f'"timestamp":"{stored}"' in encode(*triple, max_bytes=10_000).decode()


def test_a_time_with_an_offset_becomes_utc():
    paris = datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=1)))
    triple = records.message({"sender": "a", "content": "b", "timestamp": paris}, NOW)
    assert b'"timestamp":"2026-01-02T02:00:00Z"' in encode(*triple, max_bytes=10_000)


@pytest.mark.parametrize(
    ("field", "value"), [("importance", math.nan), ("content", "\0"), ("context", {"a": "\ud800"})]
)
def test_what_no_database_stores_is_refused_when_it_is_queued(field: str, value: Any):
    triple = records.message({"sender": "a", "content": "b", field: value}, NOW)
    with pytest.raises(InvalidOperation) as caught:
        encode(*triple, max_bytes=10_000)
    assert caught.value.field.startswith(field)
