"""An operation as it lies in the inbox: a checksum, numbers, the table's name and the data."""

import struct
import zlib

from helena_cli.batch.operation import KINDS, Kind, Operation
from helena_cli.batch.tally import Tally

#: Kind, table and encoded data of an operation.
Row = tuple[Kind, str, bytes]

#: A record: the checksum of the rest; id, kind, lengths of table and data; table; data.
_CHECKSUM = struct.Struct("<I")
_FIELDS = struct.Struct("<qBHI")
_RECORD = struct.Struct("<IqBHI")

#: Bytes before the table's name.
HEAD = _RECORD.size

#: More bytes than an inbox holds.
_ENDLESS = 2**32

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


def encode(identifier: int, row: Row) -> bytes:
    """The record of an operation."""
    kind, table, data = row
    name = table.encode()
    fields = _FIELDS.pack(identifier, _NUMBERS[kind], len(name), len(data)) + name
    return b"".join((_CHECKSUM.pack(zlib.crc32(data, zlib.crc32(fields))), fields, data))


def identifier(head: bytes) -> int:
    """The id of the operation whose record begins so."""
    return int(_FIELDS.unpack_from(head, _CHECKSUM.size)[0])


def length(content: bytes) -> int:
    """How many bytes the first record says that it takes; endless where none begins."""
    if len(content) < HEAD:
        return _ENDLESS
    _, _, name, size = _FIELDS.unpack_from(content, _CHECKSUM.size)
    return int(HEAD + name + size)


def parse(content: bytes, count: int) -> tuple[list[Operation], int]:
    """The whole records at the beginning, so many at most, and how many bytes they take."""
    operations: list[Operation] = []
    view = memoryview(content)
    at, end_of_content = 0, len(content)
    while at + HEAD <= end_of_content and len(operations) < count:
        checksum, number, kind, name, size = _RECORD.unpack_from(content, at)
        middle = at + HEAD + name
        end = middle + size
        if end > end_of_content or checksum != zlib.crc32(view[at + _CHECKSUM.size : end]):
            break
        table = content[at + HEAD : middle].decode()
        operations.append(Operation(number, KINDS[kind], table, content[middle:end]))
        at = end
    return operations, at


def count(content: bytes, after: int, tally: Tally) -> int:
    """Add the records that begin here, but for those up to an id; where the next one begins.

    0 where something is no record. The data are not looked at, and need not be there.
    """
    at, end = 0, len(content)
    while at + HEAD <= end:
        _, number, kind, name, size = _RECORD.unpack_from(content, at)
        middle = at + HEAD + name
        if middle > end:
            break
        # The checksum is over the data too, so it is not looked at.
        try:
            known, table = KINDS[kind], content[at + HEAD : middle].decode()
        except (IndexError, UnicodeDecodeError):
            return 0
        if not table:
            return 0
        if number > after:
            tally.add(number, known, table)
        at = middle + size
    return at
