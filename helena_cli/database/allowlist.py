"""What a file of the SQL backlog may contain: rows written to known tables, and nothing else.

Two looks, and both must be content. One goes over the statement's own words, as PostgreSQL's
scanner sees them: only listed functions are called, nothing is there that can be read in two ways.
The other goes over the tree that sqlglot makes of them: only listed kinds of nodes, only known
tables. For the second, strings are replaced by a plain one and comments are left out, so that the
two scanners cannot disagree. What is sent to the server in the end is the file's own text.
"""

import string
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from helena_cli.database.script import Kind, Statement, Token

if TYPE_CHECKING:
    # Imported on use: it takes a quarter of a second, and most runs find no backlog.
    from sqlglot import exp


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Schema, None for what the search path finds, and name of a table.
TableName = tuple[str | None, str]

STATEMENTS = ("insert", "update", "delete")

FUNCTIONS = _words(
    "now clock_timestamp statement_timestamp transaction_timestamp to_timestamp to_date date_trunc "
    "make_interval extract cast coalesce nullif greatest least abs round floor ceil "
    "gen_random_uuid md5 lower upper initcap trim btrim ltrim rtrim length char_length left right "
    "substr substring replace concat concat_ws split_part to_char to_number "
    "to_json to_jsonb json_build_object jsonb_build_object json_build_array jsonb_build_array "
    "jsonb_set jsonb_strip_nulls array_append array_prepend array_remove array_cat array_to_string "
    "string_to_array cardinality count sum avg min max"
)

_TYPES = _words(
    "text varchar character char bpchar varying smallint int2 integer int int4 bigint int8 real "
    "float float4 float8 precision numeric decimal boolean bool date time timetz timestamp "
    "timestamptz zone interval json jsonb uuid bytea"
)

#: Before a parenthesis, these call no function; PostgreSQL keeps most of them for itself.
_STRUCTURE = _words(
    "values in and or not where when then else on using from select any some all array row between "
    "as exists set by having limit offset distinct union except intersect like ilike is returning "
    "join filter materialized"
)

#: Any other name before a string would be the name of a type, but sqlglot takes it for a column.
_BEFORE_STRING = _words(
    "select distinct all and or not where when then else case on by between like ilike escape "
    "returning zone limit from both leading trailing similar to"
)

_OPERATORS = _words("= <> != < > <= >= + - * / % || -> ->> #> #>> @> <@ && ~ ~* !~ !~*")

_NODES = _words(
    "Insert Update Delete Schema Table TableAlias Identifier Values Tuple OnConflict Returning "
    "Select Subquery Union Except Intersect With CTE From Join Where Group Having Order Ordered "
    "Limit Offset Distinct Column Star Alias Aliases PropertyEQ Literal Null Boolean Paren Var "
    "DataType DataTypeParam Interval AtTimeZone JSONPath JSONPathRoot JSONPathKey Lambda Bracket "
    "Filter Between In Is Any All Exists Like ILike Escape"
)

_DATA_TYPES = _words(
    "TEXT VARCHAR CHAR BPCHAR SMALLINT INT BIGINT FLOAT DOUBLE DECIMAL BOOLEAN DATE TIME TIMETZ "
    "TIMESTAMP TIMESTAMPTZ TIMESTAMPNTZ INTERVAL JSON JSONB UUID VARBINARY ARRAY"
)

#: Right behind a number they would be part of it, or not, by the server's release.
_MORE = frozenset(f"{string.ascii_letters}{string.digits}_$.")

#: A longer statement would take sqlglot minutes and gigabytes.
MOST_TOKENS = 100_000

#: They would end the transaction that holds the other files, or change how those are understood.
_FORBIDDEN = _words("begin start commit end rollback abort savepoint release set reset discard")


class NotAllowed(Exception):
    """A statement is refused; the text is the reason for a person."""


def check(statement: Statement, tables: Collection[TableName]) -> None:
    """Let through what writes rows to these tables. Raises NotAllowed."""
    tokens = statement.tokens
    first = _word(tokens[0])
    if first not in (*STATEMENTS, "with"):
        raise NotAllowed(f"{tokens[0].text[:40].upper()} is not allowed, only {_list(STATEMENTS)}")
    if len(tokens) > MOST_TOKENS:
        raise NotAllowed(f"it has more than {MOST_TOKENS:,} words and signs, too many to check")
    for at in range(len(tokens)):
        _check_token(tokens, at)
    tree = _parse(tokens)
    _check_nodes(tree)
    _check_tables(tree, tables)


def check_control(statement: Statement) -> None:
    """Let through everything that leaves the transaction and the session alone.

    Raises NotAllowed.
    """
    words = [_word(token) for token in statement.tokens]
    if words[0] in _FORBIDDEN or words[:2] == ["prepare", "transaction"]:
        raise NotAllowed(
            f"{words[0].upper()} is not allowed: a file shares its transaction and its session "
            "with others"
        )
    if words[0] == "copy" and {"stdin", "stdout"} & set(words):
        raise NotAllowed("COPY from or to the client is not possible here")


def _list(words: Iterable[str]) -> str:
    *others, last = (word.upper() for word in words)
    return f"{', '.join(others)} and {last}"


def _word(token: Token) -> str:
    """A keyword or name as PostgreSQL folds it, "" for anything else."""
    return token.text.lower() if token.kind is Kind.WORD else ""


# The first look: the words


def _check_token(tokens: Sequence[Token], at: int) -> None:
    token = tokens[at]
    before = tokens[at - 1] if at else None
    known = {
        Kind.WORD: token.text.isascii(),
        Kind.OPERATOR: token.text in _OPERATORS,
        Kind.PUNCTUATION: token.text not in (":", ";", ".."),
        Kind.ODD_STRING: False,
        Kind.OTHER: False,
    }
    if not known.get(token.kind, True):
        raise NotAllowed(f"{token.text[:40]!r} is not understood outside of quotes")
    if before is None:
        return
    if before.kind is Kind.NUMBER and token.start == before.end and token.text[0] in _MORE:
        raise NotAllowed(f"{before.text[:40]}{token.text[:40]} is not a number")
    if token.kind is Kind.STRING:
        _check_before_string(before)
    if token.text == "(" and before.kind in (Kind.WORD, Kind.QUOTED_NAME):
        _check_call(tokens, at - 1)


def _check_before_string(before: Token) -> None:
    fine = before.kind in (Kind.PUNCTUATION, Kind.OPERATOR)
    if not fine and _word(before) not in _BEFORE_STRING | _TYPES:
        raise NotAllowed(f"a string after {before.text[:40]} is not understood")


def _check_call(tokens: Sequence[Token], at: int) -> None:
    """A name before a parenthesis calls a function, unless its place says otherwise."""
    name, before = _word(tokens[at]), [_word(token) or token.text for token in tokens[:at][-3:]]
    # INSERT INTO table (...), INTO schema.table (...), AS alias (...)
    if before[-1:] in (["into"], ["as"]) or (before[:1] == ["into"] and before[-1:] == ["."]):
        return
    if before[-1:] != ["."] and name in FUNCTIONS | _STRUCTURE | _TYPES:
        return
    if name == "conflict" and before[-1:] == ["on"]:
        return
    raise NotAllowed(f"the function {tokens[at].text[:80]}() is not on the list")


# The second look: the tree


def _parse(tokens: Sequence[Token]) -> "exp.Expr":
    import sqlglot
    from sqlglot.errors import SqlglotError

    neutral = {Kind.STRING: "'s'", Kind.NUMBER: "1"}
    text = " ".join(neutral.get(token.kind, token.text) for token in tokens)
    try:
        trees = sqlglot.parse(text, dialect="postgres")
    except RecursionError:
        raise NotAllowed("it is nested too deeply") from None
    # A parser that stumbles has not understood the statement; that must not stop the others.
    except (SqlglotError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise NotAllowed("it is not understood") from None
    if len(trees) != 1 or trees[0] is None:
        raise NotAllowed("it is not understood")
    return trees[0]


def _check_nodes(tree: "exp.Expr") -> None:
    from sqlglot import exp

    if type(tree).__name__.lower() not in STATEMENTS:
        raise NotAllowed(f"only {_list(STATEMENTS)} are allowed")
    # Each call was looked at by its name already. A dot would reach into a row, and can call too.
    harmless = (exp.Func, exp.Binary, exp.Unary, exp.Predicate)
    for node in tree.walk():
        kind = type(node).__name__
        if isinstance(node, exp.Dot) or (kind not in _NODES and not isinstance(node, harmless)):
            raise NotAllowed(f"{kind} is not allowed")
        if isinstance(node, exp.DataType) and _type_name(node) not in _DATA_TYPES:
            raise NotAllowed("a cast to this type is not allowed")


def _type_name(node: "exp.DataType") -> str:
    return str(getattr(node.this, "name", node.this))


def _check_tables(tree: "exp.Expr", tables: Collection[TableName]) -> None:
    """Every table is known; what WITH names counts where PostgreSQL sees it.

    That is in what follows it, and never as the table that is written to.
    """
    from sqlglot import exp

    withs = list(tree.find_all(exp.With))
    if len(withs) > 1 or any(found.parent is not tree or found.recursive for found in withs):
        raise NotAllowed("WITH is allowed once, at the beginning, and without RECURSIVE")
    targets = {id(_target(node)) for node in tree.find_all(exp.Insert, exp.Update, exp.Delete)}
    named: set[TableName] = set()
    parts: list[exp.Expr] = [*withs[0].expressions] if withs else []
    for found in withs:
        found.pop()
    for part in (*parts, tree):
        for table in part.find_all(exp.Table):
            _check_table(table, tables if id(table) in targets else {*tables, *named})
        if part is not tree:
            named.add((None, _folded(part.args["alias"].this)))


def _target(node: "exp.Expr") -> "exp.Expr | None":
    from sqlglot import exp

    return node.find(exp.Table, bfs=True) if isinstance(node.this, exp.Schema) else node.this


def _check_table(table: "exp.Table", known: Collection[TableName]) -> None:
    from sqlglot import exp

    schema, name = table.args.get("db"), table.this
    if table.args.get("catalog") or not isinstance(name, exp.Identifier):
        raise NotAllowed("something that is not a table is written to or read")
    if (schema and _folded(schema), _folded(name)) in known:
        return
    shown = f"{_folded(schema)}.{_folded(name)}" if schema else _folded(name)
    raise NotAllowed(f"the table {shown} is not known; [pending] tables can name it")


def _folded(identifier: "exp.Expr") -> str:
    return identifier.name if identifier.args.get("quoted") else identifier.name.lower()
