"""Statements of other sessions, fit to be shown: passwords in them are nobody else's business."""

import re
from typing import Any

# What may stand between two words; it never goes back, so that no statement takes long.
_GAP = r"(?>\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*+"

# Any literal, also one that was cut, or goes on in the next line.
_LITERAL = (
    r"(?:e'(?>[^'\\]|\\.|'')*+(?:'|$)|(?:u&)?'(?>[^']|'')*+(?:'|$)"
    r"|\$(?P<tag>\w*)\$.*?(?:\$(?P=tag)\$|$))(?:\s*\n\s*'(?>[^']|'')*+(?:'|$))*"
)

_NAME = r"\b(?:password|passwd|pwd)"

_FLAGS = re.IGNORECASE | re.DOTALL

_SECRETS = (
    # dblink('password=''it'' …') and the like: a quoted value within a literal.
    (re.compile(rf"({_NAME}\s*=\s*)(?:''[^']+''|\\'.*?\\')", _FLAGS), r"\1***"),
    # ALTER ROLE … PASSWORD 'it', and a column of that name, = 'it' or = md5('it').
    (
        re.compile(rf'({_NAME}"?{_GAP}[=:<>!~]*{_GAP}(?:\w+\s*\(\s*)?){_LITERAL}', _FLAGS),
        r"\1'***'",
    ),
    (re.compile(rf"(\bcrypt\s*\(\s*){_LITERAL}", _FLAGS), r"\1'***'"),
    # CREATE SUBSCRIPTION … CONNECTION 'host=… password=it'.
    (re.compile(rf"({_NAME}\s*=\s*)(?!\w+\s*\()[^\s'\"]+", _FLAGS), r"\1***"),
    (re.compile(r"(://[^\s:/@'\"]*:)[^\s'\"/]+(?=@)"), r"\1***"),
)


def readable(value: Any, encoding: str) -> Any:
    """Text that the server handed out as it is, as far as it can be read; anything else unchanged.

    `encoding` is the server's name for the encoding of the database that was asked.
    """
    if isinstance(value, list):
        return [readable(one, encoding) for one in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        pass
    try:
        # What PostgreSQL calls WIN1252 is cp1252 in Python.
        return value.decode(encoding.replace("WIN", "cp"), "replace")
    except LookupError:
        return value.decode(errors="replace")


def without_secrets(query: str | None) -> str | None:
    """The statement with *** in place of what looks like a password."""
    if query is None:
        return None
    for secret, shown in _SECRETS:
        query = secret.sub(shown, query)
    return query
