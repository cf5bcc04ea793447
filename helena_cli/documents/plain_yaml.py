"""Front matter of the usual kind, read without a parser of YAML: that is ten times as fast.

Usual are lines of a key and a text, a number, a day, a time, or a list of those. What is read here
is what YAML reads there. Of everything else, and of everything odd, nothing is said: YAML has to.
"""

import re
from collections.abc import Callable, Iterable
from datetime import date, datetime
from typing import Any

#: Of a block up to this length no value can be too large to be kept. Characters.
_LONGEST = 4096

_DAY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
#: Newer versions of Python know an hour 24, YAML does not.
_TIME = _DAY + r"T(?:[01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}(?:Z|[+-][0-9]{2}:[0-9]{2})"
_NUMBER = r"-?(?:0|[1-9][0-9]{0,17})"
_QUOTED = r"""\"[^"\\]*\"|'[^']*'"""
#: What begins with a letter or a slash is text, but for a few words, as long as no colon ends it.
_TEXT = r"(?:[^\W\d]|/)[^:#]*+(?::(?=[^ :#])[^:#]*+)*+"
#: Within brackets more characters have a meaning, the question mark to some parsers.
_ITEM_TEXT = r"(?:[^\W\d]|/)[^:#?,\[\]{}]*+"

_VALUE = rf"(?:({_TIME})|({_DAY})|({_NUMBER})|({_QUOTED})|({_TEXT})) *"
_ITEM = rf"(?:({_TIME})|({_DAY})|({_NUMBER})|({_QUOTED})|({_ITEM_TEXT})) *"
_UNNAMED_ITEM = re.sub(r"\((?!\?)", "(?:", _ITEM)
_LIST = rf"\[ *((?:{_UNNAMED_ITEM}(?:, *{_UNNAMED_ITEM})*+)?)\] *"

#: YAML refuses keys of more than 1,024 characters.
_ENTRY = re.compile(rf"([A-Za-z_][\w-]{{0,99}}):(?: +(?:{_VALUE}|{_LIST}))? *")
#: The number of the group of a list there.
_AT_LIST = 7
_BLOCK_ITEM = re.compile(rf"( *)- +{_VALUE}")
_LIST_ITEM = re.compile(rf"{_ITEM}(?:, *|\Z)")

#: Words that YAML takes for something else than text, some of them in any case.
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_ODD_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off"})


def read(block: str) -> dict[str, Any] | None:
    """The fields of a block, as JSON values; None when YAML has to read it."""
    if len(block) > _LONGEST:
        return None
    try:
        return _fields(block.split("\n"))
    except ValueError:
        return None


def _fields(lines: Iterable[str]) -> dict[str, Any]:
    """Raises ValueError for anything unusual."""
    fields: dict[str, Any] = {}
    name = indent = None
    for line in filter(None, lines):
        if not line.isprintable():
            # It may hold what YAML takes for the end of a line, or refuses.
            raise ValueError
        entry = _ENTRY.fullmatch(line)
        if entry is not None:
            name, indent = _name(entry[1]), None
            fields[name] = _value(entry)
            if entry.lastindex != 1:
                name = None
            continue
        item = _BLOCK_ITEM.fullmatch(line)
        if item is None or name is None or indent not in (None, item[1]):
            raise ValueError
        if indent is None:
            fields[name], indent = [], item[1]
        fields[name].append(_scalar(item, 2))
    return fields


def _name(key: str) -> str:
    if key.lower() in _ODD_WORDS:
        raise ValueError
    return key


def _value(entry: re.Match[str]) -> Any:
    if entry.lastindex == 1:
        return None
    if entry.lastindex == _AT_LIST:
        return [_scalar(item, 1) for item in _LIST_ITEM.finditer(entry[_AT_LIST])]
    return _scalar(entry, 2)


def _scalar(match: re.Match[str], first: int) -> Any:
    """The value of the one group that matched; `first` is that of a time."""
    at = match.lastindex or 0
    return _READ[at - first](match[at])


def _text(text: str) -> Any:
    text = text.rstrip(" ")
    if text.lower() in _ODD_WORDS:
        if text not in _WORDS:
            raise ValueError
        return _WORDS[text]
    return text


#: In the order of the groups. What is no day or time raises ValueError.
_READ: tuple[Callable[[str], Any], ...] = (
    lambda text: datetime.fromisoformat(text).isoformat(),
    lambda text: date.fromisoformat(text).isoformat(),
    int,
    lambda text: text[1:-1],
    _text,
)
