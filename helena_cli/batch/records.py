"""What the known tables hold: records, checked and completed with their defaults.

Pure: a builder turns a caller's mapping and the time of the call into one operation. The classes
say which fields there are. A field that is left out, or None, takes its default where it has one;
otherwise None is NULL, and what is left out stays as it is in a row that exists.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Required, TypedDict, get_type_hints
from uuid import uuid4

from msgspec import Struct

from helena_cli.batch.fields import (
    Check,
    Classification,
    Document,
    Flag,
    Integer,
    Json,
    Name,
    Number,
    Tags,
    Text,
    Time,
    Unfit,
    check_of,
    kind_of,
)
from helena_cli.batch.operation import Kind
from helena_cli.errors import InvalidOperation

Triple = tuple[Kind, str, Mapping[str, Any]]


class DocumentReference(TypedDict, total=False):
    """A document in a search index: one row of `es_document_references` for each `es_doc_id`."""

    #: The identifier of the document, unique over all indexes. Required.
    es_doc_id: Required[Name]
    #: The index that holds it; by default `osint_reports_pdf`.
    es_index: Text
    #: What kind of document it is; by default `document`.
    doc_type: Text
    #: Who published it.
    issuer: Text | None
    #: Where it can be read.
    report_url: Text | None
    #: The name of its file.
    filename: Text | None
    #: The size of its file in bytes.
    file_size: Integer | None
    #: The SHA-256 of its file, hexadecimal.
    sha256: Text | None
    #: When it was indexed; by default the time of the call.
    indexed_at: Time
    #: Who may read it: `public` (the default), `confidential`, `internal` or `restricted`.
    data_classification: Classification
    #: The investigation that it belongs to.
    investigation_id: Text | None
    #: Words to find it by; by default none.
    tags: Tags
    #: Whatever else is known of it, as JSON; by default `{}`.
    metadata: Document


class Message(TypedDict, total=False):
    """A message to the team: one row of `messages`, never changed once it is there."""

    #: The key of the message, 255 characters at most; by default a new UUID.
    id: Name
    #: The project that it is about.
    project_id: Text | None
    #: Who says it. Required.
    sender: Required[Text]
    #: To whom; by default `Team`.
    recipient: Text
    #: What kind of message it is; by default `NOTIFICATION`.
    message_type: Text
    #: What it says. Required.
    content: Required[Text]
    #: Facts to go with the text, as JSON; by default `{}`.
    context: Document
    #: When it was said; by default the time of the call.
    timestamp: Time
    #: Whether somebody should answer.
    requires_response: Flag | None
    #: The id of the message that it answers: that one must exist, or be queued.
    response_to: Name | None
    #: From 0, noise, to 1, urgent; by default 0.5.
    importance: Number
    #: Words to find it by.
    tags: Tags | None


class AgentContext(TypedDict, total=False):
    """Something an agent remembers: one row of `agent_contexts` for each agent, project and key."""

    #: Who remembers it. Required.
    agent_name: Required[Text]
    #: In which project. Required; empty text for none.
    project_id: Required[Text]
    #: Under which name. Required.
    context_key: Required[Text]
    #: What is remembered: any JSON but a bare text. Required.
    context_value: Required[Json]
    #: When; by default the time of the call.
    updated_at: Time
    #: From 0 to 1.
    importance: Number | None


class DocumentUsage(TypedDict, total=False):
    """One access to a document: a new row of `es_document_usage_log` for each call."""

    #: The document, which must be among the references, or queued. Required.
    es_doc_id: Required[Name]
    #: The person or program that read it. Required.
    accessed_by: Required[Text]
    #: When; by default the time of the call.
    access_timestamp: Time
    #: The query that found it.
    query_used: Text | None
    #: What it was read for.
    access_purpose: Text | None
    #: The session in which that happened.
    session_id: Text | None
    #: How many documents the query found.
    results_count: Integer | None
    #: How long the query took, in milliseconds.
    response_time_ms: Number | None


class _Record(Struct, frozen=True):
    """What is to be known about a kind of record to build it."""

    noun: str
    kind: Kind
    table: str
    checks: Mapping[str, Check]
    required: frozenset[str]
    defaults: Mapping[str, Callable[[datetime], Any]]

    def build(self, data: Any, now: datetime) -> Triple:
        if not isinstance(data, Mapping):
            raise self._invalid("data", f"it must map fields to values, not be {kind_of(data)}")
        row = dict(self._checked(data))
        for field in self.checks:
            if field in row:
                continue
            if field in self.required:
                raise self._invalid(field, "it is required")
            if field in self.defaults:
                row[field] = self.defaults[field](now)
        return self.kind, self.table, row

    def _checked(self, data: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
        for field, value in data.items():
            check = self.checks.get(field)
            if check is None:
                raise self._unknown(field)
            if value is not None:
                try:
                    yield field, check(value)
                except Unfit as error:
                    raise self._invalid(field, str(error)) from None
            elif field not in self.required and field not in self.defaults:
                yield field, None

    def _invalid(self, field: str, reason: str) -> InvalidOperation:
        return InvalidOperation(
            f"The {self.noun} was refused: {field}: {reason}.",
            field=field,
            remedy="Nothing was queued. Mend the value and call again.",
        )

    def _unknown(self, field: Any) -> InvalidOperation:
        name = field if isinstance(field, str) else repr(field)
        near = get_close_matches(name, self.checks, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else "."
        return InvalidOperation(
            f"The {self.noun} was refused: it has no field {name!r}{hint}",
            field=name,
            remedy=f"Nothing was queued. Its fields are {', '.join(self.checks)}; for other columns"
            " there is add_operation.",
        )


def _record(
    noun: str,
    kind: Kind,
    table: str,
    fields: type,
    **defaults: Callable[[datetime], Any],
) -> _Record:
    hints = get_type_hints(fields, include_extras=True)
    return _Record(
        noun=noun,
        kind=kind,
        table=table,
        checks={name: check_of(hint) for name, hint in hints.items()},
        required=vars(fields)["__required_keys__"],
        defaults=defaults,
    )


def _call_time(now: datetime) -> datetime:
    return now


_DOCUMENT_REFERENCE = _record(
    "document reference",
    "insert",
    "es_document_references",
    DocumentReference,
    es_index=lambda _: "osint_reports_pdf",
    doc_type=lambda _: "document",
    data_classification=lambda _: "public",
    indexed_at=_call_time,
    tags=lambda _: [],
    metadata=lambda _: {},
)

_MESSAGE = _record(
    "message",
    "message",
    "messages",
    Message,
    id=lambda _: str(uuid4()),
    recipient=lambda _: "Team",
    message_type=lambda _: "NOTIFICATION",
    context=lambda _: {},
    timestamp=_call_time,
    importance=lambda _: 0.5,
)

_AGENT_CONTEXT = _record(
    "agent context", "insert", "agent_contexts", AgentContext, updated_at=_call_time
)

_DOCUMENT_USAGE = _record(
    "document usage",
    "insert",
    "es_document_usage_log",
    DocumentUsage,
    access_timestamp=_call_time,
)


def document_reference(data: Any, now: datetime) -> Triple:
    """The operation for a `DocumentReference`. Raises InvalidOperation, which names the field."""
    return _DOCUMENT_REFERENCE.build(data, now)


def message(data: Any, now: datetime) -> Triple:
    """The operation for a `Message`. Raises InvalidOperation, which names the field."""
    return _MESSAGE.build(data, now)


def agent_context(data: Any, now: datetime) -> Triple:
    """The operation for an `AgentContext`. Raises InvalidOperation, which names the field."""
    return _AGENT_CONTEXT.build(data, now)


def document_usage(data: Any, now: datetime) -> Triple:
    """The operation for a `DocumentUsage`. Raises InvalidOperation, which names the field."""
    return _DOCUMENT_USAGE.build(data, now)
