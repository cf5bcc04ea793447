"""Command lines as they may be shown: without the passwords that stand on them."""

import re
import shlex
from collections.abc import Sequence

HIDDEN = "***"

_WORD = r"[\w-]*(?:password|passwd|pwd|passphrase|secret|token|api[_-]?key)[\w-]*"
_VALUE = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+"
#: The user's name may be empty; a password may hold any character, "@" too.
_IN_URL = re.compile(r"(://[^\s:/@]*:)\S+@")
_ASSIGNED = re.compile(rf"(?i)({_WORD}\s*=\s*)(?:{_VALUE})")
_OPTION = re.compile(rf"(?i)(?<!\S)(--?{_WORD}\s+)(?:{_VALUE})")
_OPTION_WORD = re.compile(rf"(?i)--?{_WORD}")


def masked(text: str) -> str:
    """A line of text with a mark in place of each password."""
    for pattern in (_ASSIGNED, _OPTION):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _IN_URL.sub(rf"\1{HIDDEN}@", text)


def masked_command(argv: Sequence[str]) -> str:
    """A command as it would be typed, with a mark in place of each password."""
    words = [masked(word) for word in argv]
    for position, word in enumerate(argv[:-1]):
        if _OPTION_WORD.fullmatch(word):
            words[position + 1] = HIDDEN
    return " ".join(word if word == HIDDEN else shlex.quote(word) for word in words)
