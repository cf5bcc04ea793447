"""Deleting for good what is marked as missing: first a plan to show, then its execution.

The plan is to be made after the marks have been written, and carried out by whoever holds the
lease, so that nothing queued brings a row back.
"""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from helena_cli.documents.known import Registry
from helena_cli.documents.names import escape
from helena_cli.documents.roots import place
from helena_cli.settings import DocumentSettings

_CHUNK = 500


class PrunePlan(Struct, frozen=True):
    """What would be deleted."""

    documents: tuple[str, ...]
    #: Rows of the usage log that go with the documents.
    usage_rows: int


def plan_prune(
    paths: Sequence[Path], *, settings: DocumentSettings, host: str, registry: Registry
) -> PrunePlan:
    """Find the documents under these paths that the database has marked as missing. Read only."""
    doc_ids: list[str] = []
    for target in place(paths, settings, registry.roots(host)):
        if target.claimed:
            below = tuple(f"{path}/" if path else "" for path in map(escape, target.within))
            prefix = f"{target.namespace}:"
            doc_ids.extend(
                row[0]
                for row in registry.documents(target.namespace)
                if row[-1] and f"{row[0].removeprefix(prefix)}/".startswith(below)
            )
    return PrunePlan(
        documents=tuple(sorted(doc_ids)),
        usage_rows=sum(registry.usage_rows(chunk) for chunk in _chunks(doc_ids)),
    )


def prune(plan: PrunePlan, registry: Registry) -> int:
    """Delete what was planned, except what has come back since; how many documents that were."""
    return sum(registry.delete(chunk) for chunk in _chunks(plan.documents))


def _chunks(doc_ids: Sequence[str]) -> list[Sequence[str]]:
    return [doc_ids[start : start + _CHUNK] for start in range(0, len(doc_ids), _CHUNK)]
