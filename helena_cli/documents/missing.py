"""Which known documents are gone from the disk, and when that is too odd to be believed."""

import os
from collections.abc import Mapping, Sequence
from enum import Enum

from helena_cli.documents.extract import document_id
from helena_cli.documents.known import Known
from helena_cli.documents.names import escape
from helena_cli.documents.roots import Target

#: More missing documents than this, and than this share of a root, are rather an accident.
MANY = 10
MANY_SHARE = 0.2


class Standing(Enum):
    """Whether a root is there, and why its documents cannot be called missing when it is not."""

    FULL = ""
    EMPTY = "the folder is empty, like one that is not mounted; any file in it shows that it is"
    ABSENT = "the folder is not there or cannot be listed; its documents were not looked for"


def look(target: Target) -> Standing:
    """Look at the folder itself."""
    try:
        with os.scandir(target.folder) as listing:
            return Standing.FULL if next(listing, None) else Standing.EMPTY
    except FileNotFoundError:
        # When what surrounds it stands and was asked for, it was deleted: a mount point stays.
        return Standing.FULL if target.nested else Standing.ABSENT
    except OSError:
        return Standing.ABSENT


def find(target: Target, left: Mapping[str, Known], unreadable: Sequence[str]) -> list[str]:
    """The identifiers of missing documents, in order.

    They are those `left` over by the scan that it would have seen; `unreadable` are the folders of
    the root that it could not look into.
    """
    if "" in unreadable:
        return []
    namespace = target.namespace
    hidden = tuple(f"{document_id(namespace, path)}/" for path in unreadable)
    paths = [escape(path) for path in target.within]
    exact = {document_id(namespace, path) for path in paths}
    below = tuple(f"{namespace}:{path}/" if path else f"{namespace}:" for path in paths)
    return sorted(
        doc_id
        for doc_id, document in left.items()
        if not document.deleted
        and (doc_id in exact or doc_id.startswith(below))
        and not doc_id.startswith(hidden)
    )


def doubt(target: Target, standing: Standing, gone: int, known: int, *, allowed: bool) -> str:
    """Why so many missing documents must not be marked, "" when they may be.

    Only a look at a whole root can be mistaken; a path that was named is known to be gone.
    """
    if "" not in target.within:
        return ""
    if standing is Standing.FULL and gone > MANY and gone > MANY_SHARE * known and not allowed:
        share = f"that is more than {MANY_SHARE:.0%} of {known:,}"
        return f"{share}; if it is right: helena process-pending --allow-missing"
    return standing.value
