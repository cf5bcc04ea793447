"""Statements of other sessions, fit to be shown: passwords in them are nobody else's business."""

import re

_SECRETS = (
    # dblink('password=''it'' …') and the like: a quoted value within a literal.
    (re.compile(r"(\bpassword\s*=\s*)''[^']+''", re.IGNORECASE), r"\1***"),
    # ALTER ROLE … PASSWORD 'it', and a column of that name; the statement may have been cut.
    (
        re.compile(r"(\bpassword\s*(?:=\s*|\s))(?:e|u&)?'(?:[^']|'')*(?:'|$)", re.IGNORECASE),
        r"\1'***'",
    ),
    # CREATE SUBSCRIPTION … CONNECTION 'host=… password=it'.
    (re.compile(r"(\bpassword\s*=\s*)[^\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(://[^\s:/@'\"]*:)[^\s'\"/]+(?=@)"), r"\1***"),
)


def without_secrets(query: str | None) -> str | None:
    """The statement with *** in place of what looks like a password."""
    if query is None:
        return None
    for secret, shown in _SECRETS:
        query = secret.sub(shown, query)
    return query
