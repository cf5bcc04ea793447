"""The rules of the configuration, compiled: what a document's name, path and text say about it."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

from msgspec import Struct

from helena_cli.errors import ConfigurationError
from helena_cli.settings import PathRule, Rules

Classification = Literal["public", "confidential", "internal", "restricted"]
CLASSIFICATIONS: tuple[str, ...] = get_args(Classification)

Matcher = Callable[[str], object]


class Classifier(Struct, frozen=True):
    """Compiled rules. Names and texts are given in lower case."""

    types: tuple[tuple[str, Matcher | None, tuple[Matcher, ...]], ...]
    default_type: str
    tag_rules: tuple[tuple[str, Matcher | None], ...]
    investigations: tuple[tuple[str, Matcher], ...]
    default_investigation: str
    classifications: tuple[tuple[str, Matcher], ...]

    def doc_type(self, name: str, text: str) -> str:
        """The type of the first rule that fits the file's name, or every pattern the text."""
        for kind, in_name, in_text in self.types:
            if in_name is not None and in_name(name):
                return kind
            if in_text and all(matches(text) for matches in in_text):
                return kind
        return self.default_type

    def tags(self, text: str) -> list[str]:
        """The tags of all rules that fit."""
        return [tag for tag, matches in self.tag_rules if matches is None or matches(text)]

    def investigation(self, path: str) -> str:
        """The investigation that a path belongs to."""
        return _first(self.investigations, path) or self.default_investigation

    def classification(self, path: str) -> str:
        """The classification that a path asks for."""
        return _first(self.classifications, path) or "public"


@lru_cache(maxsize=8)
def compile_rules(rules: Rules) -> Classifier:
    """Compile once for each configuration. Raises ConfigurationError for what cannot be stored."""
    for rule in rules.classifications:
        if rule.value not in CLASSIFICATIONS:
            raise ConfigurationError(
                f"[documents.rules] classifications: there is no classification {rule.value!r}.",
                remedy=f"Use one of {', '.join(CLASSIFICATIONS)}.",
            )
    return Classifier(
        types=tuple(
            (
                rule.type,
                _matcher(rule.name) if rule.name is not None else None,
                tuple(map(_matcher, rule.content)),
            )
            for rule in rules.types
        ),
        default_type=rules.default_type,
        tag_rules=tuple(
            (rule.tag, _matcher(rule.content) if rule.content is not None else None)
            for rule in rules.tags
        ),
        investigations=_path_rules(rules.investigations),
        default_investigation=rules.default_investigation,
        classifications=_path_rules(rules.classifications),
    )


def _path_rules(rules: Sequence[PathRule]) -> tuple[tuple[str, Matcher], ...]:
    return tuple((rule.value, _matcher(rule.path)) for rule in rules)


def _first(rules: Sequence[tuple[str, Matcher]], path: str) -> str | None:
    return next((value for value, matches in rules if matches(path)), None)


def _matcher(pattern: str) -> Matcher:
    """Whether a pattern occurs. Plain words are looked for without `re`: ten times as fast."""
    if any(character in r".^$*+?{}[]\()" for character in pattern):
        return re.compile(pattern).search
    first, *others = pattern.split("|")
    if not others:
        return lambda text: first in text
    if len(others) == 1:
        second = others[0]
        return lambda text: first in text or second in text
    return re.compile(pattern).search
