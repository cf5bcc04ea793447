"""What the catalog says of the tables that operations name.

Nothing here waits for a lock on those tables: functions that open a relation, such as pg_get_expr
or pg_get_indexdef, hang for as long as somebody holds it, and so would every flush.
"""

import time
from collections.abc import Callable, Iterable

import msgspec

from helena_cli.batch.flush import Waiting
from helena_cli.batch.operation import Operation
from helena_cli.batch.reading import Reader, Reading
from helena_cli.batch.table import Column, ForeignKey, Table
from helena_cli.database.bulk_load import BulkLoad
from helena_cli.database.transaction import Transaction

#: Seconds for which a table is taken to be as it was.
TIME_TO_LIVE = 30.0

# Names that the search path hides, or that belong to no table, are not found. A key whose index
# compares otherwise than its column does is no key here.
_TABLES = b"""\
SELECT lane.n, c.oid::bigint, s.nspname::text, c.relname::text,
  (SELECT coalesce(json_agg(json_build_object(
      'name', a.attname,
      'type', format_type(a.atttypid, a.atttypmod),
      'equality', CASE WHEN a.atttypid IN (20, 21, 23) THEN 'integer'
                       WHEN a.atttypid = 2950 THEN 'uuid'
                       WHEN a.atttypid IN (25, 1043) AND l.collisdeterministic THEN 'text'
                       ELSE 'database' END,
      'length', CASE WHEN a.atttypid = 1043 AND a.atttypmod > 4 THEN a.atttypmod - 4 END,
      'collation', CASE WHEN a.attcollation <> t.typcollation
                        THEN quote_ident(ls.nspname) || '.' || quote_ident(l.collname) END,
      'always_identity', a.attidentity = 'a',
      'copied_as', CASE WHEN a.atttypid IN (114, 3802) THEN 'json'
                        WHEN e.oid IS NOT NULL THEN
                          CASE WHEN e.typtype IN ('b', 'e') AND e.typdelim = ','
                                AND e.oid NOT IN (114, 3802) THEN 'array' END
                        WHEN t.typtype IN ('b', 'e', 'r', 'm') AND t.typcategory <> 'A'
                          THEN 'scalar' END) ORDER BY a.attnum), '[]')::text
     FROM pg_catalog.pg_attribute a
     JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
     LEFT JOIN pg_catalog.pg_type e ON e.typarray = a.atttypid
     LEFT JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
     LEFT JOIN pg_catalog.pg_namespace ls ON ls.oid = l.collnamespace
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
  (SELECT coalesce(json_agg(k.names ORDER BY i.indisprimary DESC, i.indexrelid), '[]')::text
     FROM pg_catalog.pg_index i
     CROSS JOIN LATERAL (
       SELECT json_agg(a.attname ORDER BY u.n) AS names,
              bool_and(u.collated = a.attcollation
                       OR il.collisdeterministic AND al.collisdeterministic) AS comparable
         FROM unnest(i.indkey::int2[], i.indcollation::oid[]) WITH ORDINALITY
              AS u(attnum, collated, n)
         JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
         LEFT JOIN pg_catalog.pg_collation il ON il.oid = u.collated
         LEFT JOIN pg_catalog.pg_collation al ON al.oid = a.attcollation
        WHERE u.n <= i.indnkeyatts) k
    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indislive AND i.indimmediate
      AND NOT i.indisexclusion AND i.indpred IS NULL AND i.indexprs IS NULL AND k.comparable),
  (SELECT coalesce(json_agg(json_build_object(
      'constraint', f.conname,
      'columns', (SELECT json_agg(a.attname) FROM pg_catalog.pg_attribute a
                   WHERE a.attrelid = f.conrelid AND a.attnum = ANY(f.conkey)),
      'parent', p.oid::bigint,
      'parent_schema', ps.nspname,
      'parent_name', p.relname,
      'visible', pg_catalog.pg_table_is_visible(p.oid)) ORDER BY f.oid), '[]')::text
     FROM pg_catalog.pg_constraint f
     JOIN pg_catalog.pg_class p ON p.oid = f.confrelid
     JOIN pg_catalog.pg_namespace ps ON ps.oid = p.relnamespace
    WHERE f.conrelid = c.oid AND f.contype = 'f'),
  c.relkind IN ('r', 'p') AND NOT c.relhasrules AND NOT c.relrowsecurity
  FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS lane(schema, name, n)
  JOIN pg_catalog.pg_class c
    ON c.relname = lane.name::name AND c.relkind IN ('r', 'p', 'f', 'v')
  JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace
 WHERE CASE WHEN lane.schema IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
            ELSE s.nspname = lane.schema::name END"""

# The constraint of a partition, or of a table that a trigger writes to.
_FOREIGN_KEY = b"""\
SELECT p.oid::bigint, ps.nspname::text, p.relname::text, pg_catalog.pg_table_is_visible(p.oid)
  FROM pg_catalog.pg_constraint f
  JOIN pg_catalog.pg_class c ON c.oid = f.conrelid
  JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace
  JOIN pg_catalog.pg_class p ON p.oid = f.confrelid
  JOIN pg_catalog.pg_namespace ps ON ps.oid = p.relnamespace
 WHERE f.contype = 'f' AND f.conname = $3 AND c.relname = $2 AND s.nspname = $1"""

_decode_columns = msgspec.json.Decoder(tuple[Column, ...]).decode
_decode_keys = msgspec.json.Decoder(tuple[tuple[str, ...], ...]).decode
_decode_foreign_keys = msgspec.json.Decoder(tuple[ForeignKey, ...]).decode


class Catalog:
    """The tables behind the names of lanes, remembered for a while."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[Table, float]] = {}
        self._readers: dict[int, Reader] = {}
        self._loads: dict[int, BulkLoad] = {}

    def now(self) -> float:
        """The time by which `confirm` measures."""
        return self._clock()

    def forget(self) -> None:
        """Read every table anew."""
        self._known.clear()
        self._readers.clear()
        self._loads.clear()

    def tables(self, transaction: Transaction, lanes: Iterable[str]) -> dict[str, Table | Waiting]:
        """The table behind each lane, or why the lane must wait."""
        names, now = list(lanes), self._clock()
        old = [
            name
            for name in names
            if name not in self._known or now - self._known[name][1] > TIME_TO_LIVE
        ]
        if old:
            self._read(transaction, old)
        return {
            name: self._known[name][0] if name in self._known else _absent(name) for name in names
        }

    def reader(self, table: Table) -> Reader:
        """The reader of a table; the same one as long as the table is the same."""
        reader = self._readers.get(table.oid)
        if reader is None or reader.table != table or reader.is_full:
            self._readers[table.oid] = reader = Reader(table)
        return reader

    def bulk_load(self, reader: Reader) -> BulkLoad:
        """What loads new rows into a reader's table; the same one as long as the reader is."""
        load = self._loads.get(reader.table.oid)
        if load is None or load.reader is not reader:
            self._loads[reader.table.oid] = load = BulkLoad(reader)
        return load

    def read_ahead(self, operations: Iterable[Operation]) -> dict[str, Reading]:
        """Read what belongs to tables that are known. Safe beside the thread that writes."""
        lanes: dict[str, list[Operation]] = {}
        for operation in operations:
            lanes.setdefault(operation.table, []).append(operation)
        found: dict[str, Reading] = {}
        for lane, part in lanes.items():
            table, _ = self._known.get(lane, (None, 0.0))
            reader = self._readers.get(table.oid) if table else None
            if reader is not None:
                found[lane] = reader.read_ahead(part)
        return found

    def confirm(self, transaction: Transaction, lane: str, since: float) -> bool:
        """Whether a table is still as it was given; looks again unless that was after `since`."""
        table, read_at = self._known[lane]
        if read_at >= since:
            return True
        self._read(transaction, [lane])
        return lane in self._known and self._known[lane][0] == table

    def _read(self, transaction: Transaction, lanes: list[str]) -> None:
        parts = [lane.rpartition(".") for lane in lanes]
        schemas, names = [part[0] or None for part in parts], [part[2] for part in parts]
        rows = transaction.execute(_TABLES, [schemas, names]).fetchall()
        now = self._clock()
        for lane in lanes:
            self._known.pop(lane, None)
        for number, oid, schema, name, columns, keys, foreign_keys, copyable in rows:
            table = Table(
                oid=oid,
                schema=schema,
                name=name,
                columns=_decode_columns(columns),
                keys=_decode_keys(keys),
                foreign_keys=_decode_foreign_keys(foreign_keys),
                copyable=copyable,
            )
            self._known[lanes[number - 1]] = (table, now)


def foreign_key(
    transaction: Transaction, schema: str, table: str, constraint: str
) -> ForeignKey | None:
    """A foreign key by the names that an error gives; without its columns."""
    row = transaction.execute(_FOREIGN_KEY, [schema, table, constraint]).fetchone()
    if row is None:
        return None
    oid, parent_schema, parent_name, visible = row
    return ForeignKey(constraint, (), oid, parent_schema, parent_name, visible)


def _absent(lane: str) -> Waiting:
    return Waiting(
        f'relation "{lane}" does not exist, or is not a table',
        "42P01",
        "Create the table; without it its operations are dead letters after [batch] lane_timeout. "
        "A bare name is looked for in the search_path of the role; upper and lower case differ.",
    )
