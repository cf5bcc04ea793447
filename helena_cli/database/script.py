"""A file of SQL, cut into words and statements exactly where PostgreSQL's own scanner cuts it.

That holds while `standard_conforming_strings` is on, so whoever sends the statements sets it. What
a word means is left to others.
"""

import re
from collections.abc import Iterator
from enum import Enum
from itertools import chain

from msgspec import Struct


class Kind(Enum):
    """What a token is; comments and space are none."""

    WORD = "a keyword or a name"
    QUOTED_NAME = "a name in double quotes"
    STRING = "a string, with its quotes and its continuations on further lines"
    ODD_STRING = "B'', X'', U&'' or U&\"\""
    NUMBER = "a number"
    OPERATOR = "an operator"
    PUNCTUATION = "one of , ( ) [ ] . ; : and :: and .."
    OTHER = "what the grammar has no use for, or $1"


class Token(Struct, frozen=True, gc=False):
    """A piece of a statement. `start` and `end` are positions in the whole script."""

    kind: Kind
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Statement(Struct, frozen=True):
    """One statement as it stands in the script, without its semicolon."""

    text: str
    line: int
    tokens: tuple[Token, ...]


class Unfinished(Exception):
    """A string, a name or a comment has a beginning and no end."""


# All repetitions are possessive: they give nothing back, so that no text makes matching slow.
_PLAIN = r"'[^']*+(?:''[^']*+)*+'"
_ESCAPED = r"'(?:[^'\\]++|''|\\.)*+'"
_BITS = r"'[^']*+'"
#: What may stand between two parts of one string: space and comments, with a line's end in it.
_GAP = r"(?:[ \t\f]|--[^\n\r]*+)*+[\n\r](?:[ \t\n\r\f]|--[^\n\r]*+[\n\r])*+"
_NAME = r'"[^"]*+(?:""[^"]*+)*+"'

_TOKEN = re.compile(
    rf"""
    (?P<space> [ \t\n\r\f]++ | --[^\n\r]*+ )
  | (?P<comment> /\* )
  | (?P<escaped> [eE]{_ESCAPED} (?:{_GAP}{_ESCAPED})*+ (?!{_GAP}') )
  | (?P<odd> [bBxX]{_BITS} (?:{_GAP}{_BITS})*+ (?!{_GAP}')
           | [uU]&{_PLAIN} (?:{_GAP}{_PLAIN})*+ (?!{_GAP}') | [uU]&{_NAME} )
  | (?P<string> {_PLAIN} (?:{_GAP}{_PLAIN})*+ (?!{_GAP}') )
  | (?P<name> {_NAME} )
  | (?P<unfinished> [eEbBxX]?' | (?:[uU]&)?['"] )
  | (?P<word> [A-Za-z_\x80-\U0010ffff][A-Za-z0-9_$\x80-\U0010ffff]*+ )
  | (?P<dollar> \$ (?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*+)? \$ )
  | (?P<number> (?:[0-9]++(?:\.(?!\.)[0-9]*+)?|\.[0-9]++) (?:[eE][+-]?[0-9]++)? )
  | (?P<operator> [-+*/<>=~!@\#%^&|`?]++ )
  | (?P<punctuation> :: | \.\. | [,()\[\].;:] )
  | (?P<other> \$[0-9]++ | . )
    """,
    re.VERBOSE | re.DOTALL,
)

_KINDS = {
    "escaped": Kind.STRING,
    "string": Kind.STRING,
    "odd": Kind.ODD_STRING,
    "name": Kind.QUOTED_NAME,
    "word": Kind.WORD,
    "number": Kind.NUMBER,
    "punctuation": Kind.PUNCTUATION,
    "other": Kind.OTHER,
}

_COMMENT_EDGE = re.compile(r"/\*|\*/")


def statements(script: str) -> Iterator[Statement]:
    """Its statements; an empty one, between two semicolons, is none. Raises Unfinished."""
    tokens: list[Token] = []
    depth, line, counted = 0, 1, 0
    for token in chain(_scan(script), [Token(Kind.PUNCTUATION, ";", len(script))]):
        if token.kind is Kind.PUNCTUATION:
            depth += (token.text in "([") - (token.text in ")]")
            # A rule may hold statements in parentheses; the end of the script is added above.
            if token.text == ";" and (depth <= 0 or token.start == len(script)):
                if tokens:
                    start = tokens[0].start
                    line, counted = line + script.count("\n", counted, start), start
                    yield Statement(script[start : tokens[-1].end], line, tuple(tokens))
                tokens, depth = [], 0
                continue
        tokens.append(token)


def _scan(script: str) -> Iterator[Token]:
    position = 0
    while match := _TOKEN.match(script, position):
        group = str(match.lastgroup)
        start, position = position, match.end()
        if group == "comment":
            position = _end_of_comment(script, start)
        elif group == "dollar":
            position = script.find(match[0], position) + len(match[0])
            if position < match.end():
                raise _unfinished(script, start)
            yield Token(Kind.STRING, script[start:position], start)
        elif group == "operator":
            operator = _operator(match[0])
            position = start + len(operator)
            yield Token(Kind.OPERATOR, operator, start)
        elif group == "unfinished":
            raise _unfinished(script, start)
        elif group != "space":
            yield Token(_KINDS[group], match[0], start)


def _end_of_comment(script: str, start: int) -> int:
    """Comments nest."""
    depth = 0
    for edge in _COMMENT_EDGE.finditer(script, start):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    raise _unfinished(script, start)


def _operator(run: str) -> str:
    """The first operator of a run of such characters.

    A comment ends it. One that consists of the characters of standard SQL does not end in + or -.
    """
    operator = re.split(r"--|/\*", run)[0]
    while len(operator) > 1 and operator[-1] in "+-" and not set(operator[:-1]) & set("~!@#^&|`?%"):
        operator = operator[:-1]
    return operator


def _unfinished(script: str, start: int) -> Unfinished:
    what = "A comment" if script.startswith("/*", start) else "A string or a quoted name"
    line = script.count("\n", 0, start) + 1
    return Unfinished(f"line {line}: {what} begins here and does not end")
