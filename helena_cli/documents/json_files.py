"""The JSON files of one folder, each claimed, read and put away once."""

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from msgspec import Struct

from helena_cli.batch.claims import Claimed, Claims, Unusable
from helena_cli.batch.intake import read_object
from helena_cli.documents.names import escape
from helena_cli.documents.outbox import Failure
from helena_cli.errors import InvalidOperation

#: Files that are claimed at once.
CHUNK = 500

#: A file that is no JSON and was written to within so many seconds may only be incomplete.
YOUNG = 2.0


class PendingReport(Struct, frozen=True):
    """What became of files: found = accepted + failed + skipped."""

    found: int = 0
    accepted: int = 0
    failed: int = 0
    #: Still being written, and left for the next run; or accepted by an earlier run already.
    skipped: int = 0
    failures: tuple[Failure, ...] = ()

    def __add__(self, other: "PendingReport") -> "PendingReport":
        return PendingReport(
            found=self.found + other.found,
            accepted=self.accepted + other.accepted,
            failed=self.failed + other.failed,
            skipped=self.skipped + other.skipped,
            failures=self.failures + other.failures,
        )


class Content(Struct, frozen=True):
    """A file's JSON object, what tells it from another content, and when it was written."""

    values: dict[str, Any]
    digest: str
    #: Unix time.
    written: float


class JsonFiles:
    """The files `*.json` of a folder, and what becomes of each. A context manager.

    In a dry run nothing is moved. `clock` is Unix time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self._claims = Claims(folder, "*.json", dry_run=dry_run)
        self._max_bytes = max_bytes
        self._dry_run = dry_run
        self._clock = clock
        self._sleep = sleep
        self._accepted = self._again = 0
        self._failures: list[Failure] = []
        #: Handed out and not settled; incomplete ones.
        self._held: set[str] = set()
        self._young: set[str] = set()

    def __enter__(self) -> "JsonFiles":
        """Raises HelenaError when the folder cannot be used, or another process keeps it."""
        self._claims.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._claims.__exit__()

    def read(self) -> Iterator[tuple[Claimed, Content]]:
        """Each file that holds a JSON object; the others are settled here.

        Incomplete ones are waited for, and left when they still are after that.
        """
        yield from self._pass()
        if self._young:
            self._sleep(YOUNG)
            self._young.clear()
            yield from self._pass()

    def accept(self, file: Claimed) -> None:
        """Put a file away that is done."""
        self._accepted += 1
        self._held.discard(file.name)
        self._claims.done(file)

    def accept_again(self, file: Claimed) -> None:
        """Put a file away that an earlier run has accepted."""
        self._again += 1
        self._held.discard(file.name)
        self._claims.done(file)

    def fail(self, file: Claimed, reason: str) -> None:
        """Put a file away with the reason why it cannot be used."""
        self._failures.append(Failure(escape(str(file.path)), reason))
        self._held.discard(file.name)
        self._claims.failed(file, reason)

    def report(self) -> PendingReport:
        """What has become of the files so far."""
        skipped = self._again + len(self._young)
        return PendingReport(
            found=self._accepted + len(self._failures) + skipped,
            accepted=self._accepted,
            failed=len(self._failures),
            skipped=skipped,
            failures=tuple(self._failures),
        )

    def _pass(self) -> Iterator[tuple[Claimed, Content]]:
        for batch in self._claims.batches(CHUNK):
            for file in batch:
                if file.name in self._held:
                    continue
                try:
                    content = self._content(file)
                except Unusable as error:
                    self.fail(file, str(error))
                    continue
                if content is None:
                    self._young.add(file.name)
                    self._claims.release(file)
                    continue
                self._held.add(file.name)
                yield file, content

    def _content(self, file: Claimed) -> Content | None:
        """None when it is incomplete. Raises Unusable."""
        text = self._claims.read(file, self._max_bytes)
        written_ns = self._claims.written_ns(file)
        # The time too: a file of the same name and content that is written later is another one.
        digest = f"{sha256(text).hexdigest()} {written_ns}"
        try:
            return Content(read_object(text), digest, written_ns / 1e9)
        except InvalidOperation as error:
            if not self._dry_run and abs(self._clock() - written_ns / 1e9) < YOUNG:
                return None
            raise Unusable(str(error)) from None
