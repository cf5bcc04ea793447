"""The reading of files that may have changed: here at first, and with more processes when many.

Answers come in the order of the candidates. A process that ends before its time loses nothing:
what it was given is then read here.
"""

import os
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from helena_cli.documents.candidate import Answer, Candidate, Chunk, Root, answer
from helena_cli.settings import DocumentSettings

if TYPE_CHECKING:
    from helena_cli.documents.reader import Reader

#: With fewer candidates the start of a process does not pay.
ALONE = 500

#: More processes would only wait: to queue a document takes a third of the time of reading it.
MOST = 2

#: Candidates that are handed over together, and such chunks that one process has before it.
CHUNK = 32
DEPTH = 8
#: Chunks that may wait for the answers of an earlier one: they take memory.
WAITING = 16

Take = Callable[[Root, Candidate, Answer], None]


class Crew:
    """Reads candidates and passes on the answers. A context manager: its processes end with it."""

    def __init__(self, settings: DocumentSettings, take: Take, *, alone: bool) -> None:
        """`alone`: without other processes, however many there are."""
        self._settings = settings
        self._take = take
        self._alone = alone
        self._seen = 0
        self._readers: list[Reader] = []
        self._candidates: list[Candidate] = []
        self._chunks: deque[Chunk] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()

    def read(self, root: Root, candidate: Candidate) -> None:
        """Read a candidate, now or later. `finish` must come before one of another root."""
        self._seen += 1
        if self._seen == ALONE and not self._alone:
            self._hire()
        if not self._readers and not self._chunks:
            self._take(root, candidate, answer(candidate, root, self._settings))
            return
        self._candidates.append(candidate)
        if len(self._candidates) >= CHUNK:
            self._hand_out(root)

    def finish(self, root: Root) -> None:
        """Have all answers passed on."""
        if self._candidates:
            self._hand_out(root)
        while self._chunks:
            self._pass_on(wait=True)

    def _hire(self) -> None:
        """Start as many processes as there are other processors."""
        # Most runs are small, and need none of this.
        from helena_cli.documents.reader import Reader

        while sys.executable and len(self._readers) < min(MOST, _processors() - 1):
            try:
                self._readers.append(Reader(self._settings))
            except OSError:
                # No room for another process: then without.
                return

    def _hand_out(self, root: Root) -> None:
        """To a process that has little to do, else do it here rather than wait."""
        chunk = Chunk(root, self._candidates)
        self._candidates = []
        self._chunks.append(chunk)
        reader = next((one for one in self._readers if one.ready and len(one.chunks) < DEPTH), None)
        if reader is None:
            self._read_here(chunk)
        else:
            try:
                reader.give(chunk)
            except (OSError, EOFError):
                self._do_without(reader)
        self._pass_on(wait=len(self._chunks) > WAITING)

    def _pass_on(self, *, wait: bool) -> None:
        """Pass on the answers that have come; with `wait`, at least those of the oldest chunk."""
        for reader in list(self._readers):
            is_awaited = wait and bool(reader.chunks) and reader.chunks[0] is self._chunks[0]
            try:
                reader.look(wait=is_awaited)
            except (OSError, EOFError):
                self._do_without(reader)
        while self._chunks and self._chunks[0].answers is not None:
            chunk = self._chunks.popleft()
            for candidate, its_answer in zip(chunk.candidates, chunk.answers or (), strict=True):
                self._take(chunk.root, candidate, its_answer)

    def _do_without(self, reader: "Reader") -> None:
        """Read here what a process that has ended has left behind."""
        self._readers.remove(reader)
        reader.close()
        for chunk in reader.chunks:
            self._read_here(chunk)

    def _read_here(self, chunk: Chunk) -> None:
        read, settings = answer, self._settings
        chunk.answers = [read(one, chunk.root, settings) for one in chunk.candidates]


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
