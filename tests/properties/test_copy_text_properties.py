"""What COPY makes of a value is what the statement makes of it, for every type. Real PostgreSQL."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helena_cli.batch.plan import Mode
from helena_cli.batch.reading import Reader
from helena_cli.batch.table import Column, Table
from helena_cli.database import statement
from helena_cli.database.catalog import Catalog
from helena_cli.database.copy_text import CopyText
from helena_cli.database.transaction import Transaction

pytestmark = pytest.mark.postgres

TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'null', 'so so', '\\.');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN short AS text CHECK (length(VALUE) < 4);
CREATE DOMAIN document AS jsonb;
CREATE DOMAIN numbers AS int[];
"""

#: Type → values that it takes, in JSON; all types get all of them, and the odd ones below.
KINDS: dict[str, list[str]] = {
    "text": ['"plain"', '"é😀\u2028"', "1.50", "true"],
    "varchar(3)": ['"abc"', '"abc   "', '"abcd"', '"éé😀"'],
    "char(4)": ['"ab"', '"ab      "', '"abcd"'],
    '"char"': ['"a"', '"ab"', '"\\\\101"'],
    "name": ['"' + "n" * 70 + '"'],
    "smallint": ["32767", "32768", '" 7 "', '"0x1F"', '"1_0"'],
    "int": ["2147483647", "-1", "1.0", "1e3", '"+1"'],
    "bigint": ["9223372036854775807", "9223372036854775808"],
    "numeric": ["1.50", "1e400", '"NaN"', '"Infinity"', "-0.0"],
    "numeric(10,2)": ["1.005", "12345678901", '"1e2"'],
    "real": ["1e38", "1e39", "0.1", '"-inf"'],
    "double precision": ["1e308", "1e309", '"nan"', "5e-324"],
    "boolean": ['"yes"', '" t "', '"of"', "0"],
    "date": ['"2026-02-29"', '"20260102"', '"infinity"', '"1 Jan 2026 BC"', '"today"'],
    "timestamp": ['"2026-01-02T03:04:05.678901Z"', '"epoch"'],
    "timestamp(0)": ['"2026-01-02T03:04:05.678901+02"'],
    "timestamptz": ['"2026-01-02T03:04:05+01:00"', '"2026-01-02 03:04 Europe/Berlin"'],
    "time": ['"24:00"', '"03:04:05.5"'],
    "interval": ['"P1DT2.5S"', '"1 day"', '"-3"', "3"],
    "interval day": ['"25 hours"'],
    "uuid": ['"{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}"', '"a0eebc999c0b4ef8bb6d6bb9bd380a11"'],
    "bytea": ['"\\\\x00ff"', '"a\\\\000\\\\\\\\b"', '"\\\\x0"'],
    "json": ['{"b":1,"a":[1, 2],"b":"\\\\"}', "[]"],
    "jsonb": ['{"b":1,"a":[1, 2],"b":"\\\\"}', "1.0"],
    "jsonpath": ['"$.a"'],
    "xml": ['"<a b=\\"c\\">\\n</a>"'],
    "text[]": ['["a","b"]', '["",null,"null","NULL"]', '["a\\\\b","c\\"d",",","{","}"," x "]'],
    "varchar(2)[]": ['["ab  ","c"]', '["abc"]'],
    "int[]": ["[1,2]", '["1"," 2 "]', "[1.0]", '"{1,2}"', '"[2:3]={1,2}"'],
    "numeric(10,2)[]": ["[1.005,null]", '["NaN"]'],
    "boolean[]": ['[true,"f",false]'],
    "timestamptz[]": ['["2026-01-02T03:04:05+01:00"]'],
    "bytea[]": ['["\\\\x00ff","a"]'],
    "mood[]": ['["sad","null","so so"]'],
    "jsonb[]": ['[{"a":1},"x",1,null]', '["1"]'],
    "pair[]": ['[{"a":1,"b":"x"}]', '["(1,x)"]'],
    "short[]": ['["abc"]', '["abcd"]'],
    "box[]": ['["(1,1),(0,0)"]', '["(1,1),(0,0);(3,3),(2,2)"]'],
    "point[]": ['["(1,2)"]', "[[1,2]]"],
    "int4range[]": ['["[1,3)"]'],
    "mood": ['"sad"', '"so so"', '"\\\\."', '"glad"'],
    "int4range": ['"[1,3]"', '"empty"', "[1,3]"],
    "int4multirange": ['"{[1,3],[5,7)}"', "{}"],
    "inet": ['"10.0.0.1/32"', '"::1"'],
    "money": ["1.50", '"$1,000.00"'],
    "bit(3)": ['"101"', "101", '"1011"'],
    "bit varying": ['"x1F"', '"10"'],
    "point": ['"(1,2)"', "[1,2]"],
    "path": ['"[(1,2),(3,4)]"', "[[1,2],[3,4]]"],
    "tsvector": ["\"a:1 'b c'\""],
    "oid": ["4294967295", '"-1"'],
    "regclass": ['"pg_class"', '"nothing"'],
    "pg_lsn": ['"0/1F"'],
    "int2vector": ['"1 2"', "[1,2]"],
    "oidvector": ['"1 2"', "[1,2]"],
    "short": ['"abc"', '"abcd"'],
    "document": ['{"a":1}', '"x"'],
    "document[]": ['[{"a":1}]', '["1"]', "[1,null]"],
    "numbers[]": ["[[1],[2]]", '["{1}"]'],
    "numbers": ["[1]", '"{1}"'],
    "pair": ['{"a":1,"b":"x"}', '"(1,x)"', "{}"],
}

#: For every type, and as they stand: not only as Helena itself writes JSON.
ODD = [
    *("null", "true", "0", "-1.5e3", "1e999", "12345678901234567890", "[]", "{}", "[[]]", "[{}]"),
    *('""', '" "', '"null"', '"NULL"', '"\\\\N"', '"\\\\."', '"{}"', '"[]"', '"{a,b}"', '"1"'),
    *('"\\t"', '"\\n"', '"\\r\\n"', '"a\\\\tb"', '"\\\\"', '"\\""', '"\'"', '"\\b\\f\\u0001"'),
    *('"\\u0041\\/"', '"\\u00e9\\ud83d\\ude00"', '"\x7f\x85"', '"(1,2)"', '"a\\tb\\\\n\\nc"'),
    *(
        "[1,null]",
        '["a",null,""]',
        '["null"]',
        '["]"]',
        '["a]b","c"]',
        '["a\\tb","\\\\","\\"","\\n"]',
        '["{","}",",","["]',
    ),
    *("[[1,2],[3,4]]", "[[1],[2,3]]", '[["a"],["b"]]', '[{"a":1}]', "[ 1 , 2 ]", "[\t1,\n2\r]"),
    *('{"a":"b"}', '{"a":\t1,\n"b":\r2}', '{"a":"\\t\\\\\\n"}', '{"a":null}', '[true,"x",1]'),
    *('["\\u0041","\\u00e9"]', '{"\\u0041":"\\/"}', '"\\u001F"'),
]

Record = Mapping[str, str]


class Both:
    """Tables of one type each, written by the statement and by COPY."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg.connect(dsn, autocommit=True)
        self._transaction = Transaction(self._connection)
        self._connection.execute(TYPES.encode())
        for number, kind in enumerate(KINDS):
            columns = f"a {kind}, b text, c {kind}, d int"
            self._connection.execute(f"CREATE TABLE t{number} ({columns})".encode())
        self._transaction.begin(lock_timeout=0, statement_timeout=0, idle_timeout=0)
        names = [f"t{number}" for number in range(len(KINDS))]
        tables = Catalog().tables(self._transaction, names)
        self._tables = dict(zip(KINDS, tables.values(), strict=True))
        self.copied = 0

    def close(self) -> None:
        self._connection.close()

    def check(self, kind: str, record: Record) -> None:
        """Write a row both ways."""
        table = self._tables[kind]
        assert isinstance(table, Table)
        columns = Reader(table).columns(record)
        named = [column for column in table.columns if column.name in record]
        if any(column.copied_as is None for column in named):
            return
        text = CopyText(named)
        encoded = ("{" + ",".join(f'"{n}":{value}' for n, value in record.items()) + "}").encode()
        values = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        (line,) = text.lines([values])
        if line is None:
            return
        compose, transaction = self._transaction.compose, self._transaction
        copy = compose(statement.copy(table, text.names))
        copied = self._written(table, lambda: transaction.copy(copy, [line]))
        if isinstance(copied, psycopg.Error) or len(copied) != 1:
            # Space between values looks like a delimiter: whoever copies undoes that.
            return
        self.copied += 1
        insert = compose(statement.write(table, Mode.INSERT, columns.names, None))
        inserted = self._written(
            table, lambda: transaction.write(insert, [statement.rows([encoded])])
        )
        assert copied == inserted, (kind, record, line)

    def _written(self, table: Table, write: Callable[[], object]) -> list[Any] | psycopg.Error:
        """The rows as text, which tells everything apart; nothing is left of them."""
        try:
            with self._transaction.savepoint():
                write()
                query = f"SELECT t::text FROM {table.name} AS t".encode()
                raise _Found(self._transaction.execute(query).fetchall())
        except _Found as found:
            return found.rows
        except psycopg.Error as error:
            return error


class _Found(Exception):
    def __init__(self, rows: list[Any]) -> None:
        super().__init__()
        self.rows = rows


@pytest.fixture
def both(helena_dsn: str) -> Iterator[Both]:
    both = Both(helena_dsn)
    yield both
    both.close()


def test_copy_writes_what_the_statement_writes_of_every_type(both: Both):
    for kind, values in KINDS.items():
        for value in [*values, *ODD]:
            both.check(kind, {"a": value})
        # Next to others the fields are cut out together.
        for value in values:
            both.check(kind, {"a": value, "b": "null"})
            both.check(kind, {"a": value, "b": '""', "c": value})
            both.check(kind, {"a": value, "b": "null", "c": "null", "d": "null"})
            both.check(kind, {"d": "null", "c": "null", "b": '"null"', "a": value})
    # It must not pass for the reason that nothing is copied.
    assert both.copied > 500


texts = st.text(
    st.sampled_from("\\\\\\\"'\t\n\r{}[],;. \x01\x7fNnulabx01é😀") | st.characters(codec="utf-8"),
    max_size=6,
).filter(lambda text: "\0" not in text)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts | texts.map(lambda text: text + "\\")
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2)
)
spellings = st.sampled_from(
    [
        lambda value: msgspec.json.encode(value).decode(),
        json.dumps,
        lambda value: json.dumps(value, ensure_ascii=False, indent="\t"),
    ]
)
free = st.builds(lambda spell, value: spell(value), spellings, documents)


@st.composite
def records(draw: st.DrawFn) -> tuple[str, Record]:
    kind = draw(st.sampled_from([*KINDS, "text", "jsonb", "json", "text[]"]))
    value = st.sampled_from(KINDS[kind]) | st.sampled_from(ODD) | free
    others = {"b": free, "c": value, "d": st.just("1")}
    record = draw(st.fixed_dictionaries({"a": value}, optional=others))
    names = draw(st.permutations(list(record)))
    return kind, {name: record[name] for name in names}


@settings(
    max_examples=800,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=records())
def test_copy_writes_what_the_statement_writes_of_any_values(both: Both, case: tuple[str, Record]):
    both.check(*case)


#: As Helena itself writes them.
written = documents.map(lambda value: msgspec.json.encode(value).decode())


@given(rows=st.lists(st.tuples(written, written, written, written), max_size=8))
def test_the_lines_of_many_rows_are_those_of_each(rows: list[tuple[str, ...]]):
    copied_as: list[Literal["scalar", "json", "array"]] = ["scalar", "scalar", "array", "json"]
    for chosen in ([0, 1, 2, 3], [0], [2], [3], [0, 1]):
        columns = [Column(name=f"c{n}", type="text", copied_as=copied_as[n]) for n in chosen]
        text = CopyText(columns)
        values = [{f"c{n}": msgspec.Raw(row[n].encode()) for n in chosen} for row in rows]
        assert text.lines(values) == [line for row in values for line in text.lines([row])]
