"""What the database knows about documents: whose a namespace is, what is indexed, what used it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg

from helena_cli.database.connection import Connection, translate
from helena_cli.errors import NamespaceClaimed

# jsonb_to_record reads the metadata once for all four; as text, for they may be anybody's.
_DOCUMENTS = """
SELECT es_doc_id, sha256, file_size, m.modified_ns, m.changed_ns, m.read_ns, m.deleted_at
FROM es_document_references, jsonb_to_record(metadata)
    AS m(modified_ns text, changed_ns text, read_ns text, deleted_at text)
WHERE metadata @> jsonb_build_object('namespace', %s::text)
"""
_THESE = "AND es_doc_id = ANY(%s)"

_Row = tuple[str, str | None, int | None, str | None, str | None, str | None, str | None]


class DocumentRegistry:
    """The documents of one database, over a connection in autocommit mode.

    All methods raise DatabaseUnreachable, DatabaseRefused or SchemaMissing.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def roots(self, host: str) -> list[tuple[str, str]]:
        """The (namespace, folder) that this host has claimed."""
        with _translated():
            return [
                (str(namespace), str(path))
                for namespace, path in self._connection.execute(
                    "SELECT namespace, path FROM helena.roots WHERE host = %s", [host]
                )
            ]

    def claim(self, namespace: str, host: str, path: str, *, dry_run: bool = False) -> None:
        """Claim a namespace for a folder of a host; a dry run only looks.

        Raises NamespaceClaimed when another folder or host has it.
        """
        with _translated():
            if not dry_run:
                self._connection.execute(
                    "INSERT INTO helena.roots (namespace, host, path) VALUES (%s, %s, %s)"
                    " ON CONFLICT (namespace) DO NOTHING",
                    [namespace, host, path],
                )
            owner = self._connection.execute(
                "SELECT host, path FROM helena.roots WHERE namespace = %s", [namespace]
            ).fetchone()
        if owner is not None and owner != (host, path):
            quoted = "'" + namespace.replace("'", "''") + "'"
            raise NamespaceClaimed(
                f"The namespace {namespace!r} of {path} belongs to {owner[1]} on {owner[0]}.",
                remedy="Give this folder another one: HELENA_DOCUMENTS_NAMESPACE=NAME helena "
                f"process-pending {path}. If the other is gone for ever, release the name: "
                f"DELETE FROM helena.roots WHERE namespace = {quoted}.",
            )

    def documents(self, namespace: str, doc_ids: Sequence[str] | None = None) -> Iterator[_Row]:
        """The documents that were indexed under this namespace: these, or all.

        es_doc_id, sha256, file_size; of the metadata modified_ns, changed_ns, read_ns, deleted_at.
        """
        with _translated():
            if doc_ids is None:
                yield from self._connection.execute(_DOCUMENTS, [namespace])
            else:
                yield from self._connection.execute(_DOCUMENTS + _THESE, [namespace, list(doc_ids)])

    def metadata(self, doc_ids: Sequence[str]) -> list[tuple[str, str]]:
        """The metadata of these documents, as JSON."""
        with _translated():
            return [
                (str(doc_id), str(metadata))
                for doc_id, metadata in self._connection.execute(
                    "SELECT es_doc_id, metadata::text FROM es_document_references"
                    " WHERE es_doc_id = ANY(%s) AND jsonb_typeof(metadata) = 'object'",
                    [list(doc_ids)],
                )
            ]

    def usage_rows(self, doc_ids: Sequence[str]) -> int:
        """How many rows of the usage log refer to these documents."""
        with _translated():
            row = self._connection.execute(
                "SELECT count(*) FROM es_document_usage_log WHERE es_doc_id = ANY(%s)",
                [list(doc_ids)],
            ).fetchone()
        return int(row[0]) if row else 0

    def delete(self, doc_ids: Sequence[str]) -> int:
        """Delete those of these documents that are still marked as missing; how many were."""
        with _translated(), self._connection.transaction():
            self._connection.execute("SET LOCAL lock_timeout = '5s'")
            return self._connection.execute(
                "DELETE FROM es_document_references"
                " WHERE es_doc_id = ANY(%s) AND metadata->>'deleted_at' IS NOT NULL",
                [list(doc_ids)],
            ).rowcount


@contextmanager
def bounded(connection: Connection, *, seconds: float) -> Iterator[DocumentRegistry]:
    """The registry in one transaction of statements that end after so many seconds each.

    For a program that must not hang when the database does. Raises as the registry does.
    """
    limits = (("statement_timeout", f"{seconds:g}s"), ("lock_timeout", "5s"), ("timezone", "UTC"))
    with _translated(), connection.transaction():
        for name, value in limits:
            connection.execute("SELECT set_config(%s, %s, true)", [name, value])
        yield DocumentRegistry(connection)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error
