"""Operations that arrive as JSON text: a single object, or a stream with one on each line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol

import msgspec

from helena_cli.batch.operation import encode
from helena_cli.errors import InvalidOperation

#: Lines that are accepted in one transaction.
CHUNK = 1000

#: How many times longer than its operation a line may be: an escaped character takes six bytes.
ESCAPED = 6

_BOM = b"\xef\xbb\xbf"

# Not as floats: what has more digits than those is written as it came.
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


def read_object(text: bytes) -> dict[str, Any]:
    """Read one JSON object, perhaps after a byte order mark. Raises InvalidOperation."""
    try:
        # Not left to the decoder, which has no exception of its own for it.
        text.decode()
        value = _decode(text.removeprefix(_BOM))
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except (msgspec.MsgspecError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, msgspec.MsgspecError) else "a number is too long"
        raise _invalid(f"it is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise _invalid("it is JSON, but not an object: {...}")
    return value


def _invalid(reason: str) -> InvalidOperation:
    return InvalidOperation(
        f"The operation was refused: data: {reason}.",
        field="data",
        remedy="Nothing was queued. Give one JSON object of column to value.",
    )


class Rejection(msgspec.Struct, frozen=True):
    """A line that was not accepted."""

    #: From 1, empty ones counted too.
    line: int
    field: str
    reason: str


class Queue(Protocol):
    """Where operations go."""

    def extend(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Sequence[int]:
        """Accept operations, all or none; raises InvalidOperation, SpoolFull, SpoolUnavailable."""


class Lines:
    """Turns the bytes of a stream into operations, line by line; a bad line holds up none.

    A line is accepted with the block that completes it: who writes slowly need not wait. `accepted`
    counts; `reject` is told what was not.
    """

    def __init__(
        self,
        queue: Queue,
        kind: str,
        table: str,
        *,
        max_bytes: int,
        reject: Callable[[Rejection], None],
    ) -> None:
        """Raises InvalidOperation for a kind or table that no line could have."""
        encode(kind, table, {"column": None}, max_bytes=max_bytes)
        self._queue = queue
        self._kind = kind
        self._table = table
        self._max_bytes = max_bytes
        self._reject = reject
        self.accepted = 0
        self._line = 0
        #: The beginning of a line whose end has not come; what makes it too long is only counted.
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, block: bytes) -> None:
        """Take the next bytes. Raises SpoolFull or SpoolUnavailable."""
        *ends, begin = block.split(b"\n")
        if ends:
            self._keep(ends[0])
            lines = [self._take(), *ends[1:]]
            for start in range(0, len(lines), CHUNK):
                self._accept(lines[start : start + CHUNK])
        self._keep(begin)

    def end(self) -> None:
        """Take the last line, which need not be ended."""
        self.feed(b"\n")

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if not self._is_too_long():
            self._parts.append(part)

    def _take(self) -> bytes | None:
        """The line that is complete now; None for one that was too long."""
        line = None if self._is_too_long() else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return line

    def _is_too_long(self) -> bool:
        return self._size > self._max_bytes * ESCAPED

    def _accept(self, lines: Sequence[bytes | None]) -> None:
        rows = []
        for line in lines:
            self._line += 1
            if line is None or line.removeprefix(_BOM).strip():
                try:
                    rows.append(self._read(line))
                except InvalidOperation as error:
                    self._reject(Rejection(self._line, error.field, str(error)))
        self.accepted += len(self._queue.extend((self._kind, self._table, row) for row in rows))

    def _read(self, line: bytes | None) -> dict[str, Any]:
        """The row of a line, as the queue would take it."""
        if line is None:
            raise _invalid(f"the line is longer than {self._max_bytes * ESCAPED:,} bytes")
        row = read_object(line)
        encode(self._kind, self._table, row, max_bytes=self._max_bytes)
        return row
