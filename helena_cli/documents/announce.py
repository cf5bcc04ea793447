"""What Helena tells the team after indexing: a message, and a context to look up."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any
from uuid import uuid4

from helena_cli.documents.outbox import Change, Triple

_SENTENCES: Mapping[Change, str] = {
    "new": "{title} was indexed as {doc_id}.",
    "changed": "{title} has changed and was indexed again as {doc_id}.",
    "missing": "{title} is missing; {doc_id} was marked as deleted.",
}


def batch(
    counts: Mapping[str, int], namespaces: Iterable[str], now: datetime
) -> tuple[Triple, Triple]:
    """The message that sums up a run, and the context that records it."""
    facts: dict[str, Any] = {**counts, "namespaces": sorted(namespaces)}
    parts = ", ".join(f"{count:,} {name}" for name, count in counts.items() if name != "found")
    where = ", ".join(facts["namespaces"])
    content = f"Processed {counts['found']:,} documents of {where}: {parts}."
    return _message("BATCH_PROCESSED", content, facts, now), context(facts, now)


def context(facts: Mapping[str, Any], now: datetime) -> Triple:
    """The context that says when documents were processed last, and with what result."""
    row = {
        "agent_name": "Helena",
        "project_id": "batch_processing",
        "context_key": "last_processed",
        "context_value": {**facts, "processed_at": now},
        "updated_at": now,
    }
    return "insert", "agent_contexts", row


def document(change: Change, doc_id: str, title: str, now: datetime) -> Triple:
    """The message about a single document."""
    content = _SENTENCES[change].format(title=title, doc_id=doc_id)
    facts = {"es_doc_id": doc_id, "title": title, "change": change}
    return _message("DOCUMENT_PROCESSED", content, facts, now)


def _message(kind: str, content: str, facts: Mapping[str, Any], now: datetime) -> Triple:
    row = {
        "id": str(uuid4()),
        "sender": "Helena",
        "recipient": "Team",
        "message_type": kind,
        "content": content,
        "context": facts,
        "timestamp": now,
        "importance": 0.5,
    }
    return "message", "messages", row
