"""Operation files that programs left for Helena: `{"type": "message", "data": {...}}`.

A file is accepted and noted in one step. Whoever dies before it is put away leaves it to the next
run, which knows it by its note.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from helena_cli.batch import records
from helena_cli.batch.claims import PROCESSING, Claimed
from helena_cli.batch.operation import encode
from helena_cli.batch.records import Triple
from helena_cli.documents.json_files import Content, JsonFiles, PendingReport
from helena_cli.documents.names import escape, unescape
from helena_cli.errors import InvalidOperation

BUILDERS: Mapping[str, Callable[[Any, datetime], Triple]] = {
    "document_reference": records.document_reference,
    "message": records.message,
    "agent_context": records.agent_context,
}


class Spool(Protocol):
    """Where operation files go, and its notes on them."""

    def accept_file(self, name: str, digest: str, operations: Iterable[Triple]) -> list[int] | None:
        """Accept what a file holds and note the file; None when it was noted already."""

    def accepted_files(self, folder: str) -> list[str]:
        """The noted files of a folder."""

    def forget_files(self, names: Iterable[str]) -> None:
        """Drop their notes."""


def drain_operation_files(
    folder: Path,
    spool: Spool,
    *,
    max_bytes: int,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> PendingReport:
    """Accept every operation file of a folder into the spool, once, and put it away.

    A record without a time of its own gets that of its file. Raises HelenaError when the folder
    cannot be used, SpoolFull or SpoolUnavailable in the middle; what was accepted stays so.
    """
    with JsonFiles(folder, max_bytes=max_bytes, dry_run=dry_run, clock=clock, sleep=sleep) as files:
        notes = _Notes(spool, folder)
        if not dry_run:
            notes.tidy()
        for file, content in files.read():
            try:
                triple = operation_of(content)
                # What the spool would refuse, a dry run has to find out by itself.
                encode(*triple, max_bytes=max_bytes)
            except InvalidOperation as error:
                files.fail(file, str(error))
                continue
            if dry_run:
                files.accept(file)
                continue
            if notes.accept(file, content, triple):
                files.accept(file)
            else:
                files.accept_again(file)
            notes.forget(file)
        return files.report()


def operation_of(content: Content) -> Triple:
    """The operation that a file describes. Raises InvalidOperation."""
    kind = content.values.get("type")
    builder = BUILDERS.get(kind) if isinstance(kind, str) else None
    if builder is None:
        near = get_close_matches(kind, BUILDERS, n=1) if isinstance(kind, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InvalidOperation(
            f"The operation was refused: type: {kind!r} is not one of {', '.join(BUILDERS)}.{hint}",
            field="type",
            remedy="Nothing was queued. Mend the file and put it back.",
        )
    return builder(content.values.get("data"), datetime.fromtimestamp(content.written, UTC))


class _Notes:
    """The spool's notes on the files of one folder."""

    def __init__(self, spool: Spool, folder: Path) -> None:
        self._spool = spool
        self._folder = escape(os.path.realpath(folder))

    def tidy(self) -> None:
        """Drop the notes of files that were put away by a run that died right after."""
        folder = Path(unescape(self._folder))
        for name in self._spool.accepted_files(self._folder):
            file = unescape(name.removeprefix(f"{self._folder}/"))
            if not any(map(os.path.lexists, (folder / file, folder / PROCESSING / file))):
                self._spool.forget_files([name])

    def accept(self, file: Claimed, content: Content, triple: Triple) -> bool:
        """False when an earlier run has accepted it."""
        return self._spool.accept_file(self._name(file), content.digest, [triple]) is not None

    def forget(self, file: Claimed) -> None:
        """Drop the note of a file that has been put away."""
        self._spool.forget_files([self._name(file)])

    def _name(self, file: Claimed) -> str:
        return f"{self._folder}/{escape(file.name)}"
