"""What is read without a parser of YAML is what YAML reads."""

from datetime import date
from typing import Any

import yaml
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from helena_cli.documents import plain_yaml

KEYS = ("a", "b1", "on", "_k", "tags", "a-b", "é", "2x", '"q"', "No", "null", "<<", "a b", "- a")

#: What values are made of, and what makes them something else.
PIECES = """
true false yes No null ~ TRUE oN y word two_ it's C# E=mc2 a]b {a} [a] [a,b] 0 1 -2 012 1.5 1_000
12:30 0x1f 1e3 2026-01-02 2026-13-02 2024-01-02T03:04:05Z 2024-01-02T03:04:05+02:00 http://x.y/z
2024-01-02T25:04:05Z /a/b /a#b "x" "x\\n" 'y' 'it''s' é 日本 \U0001f600 & * ! | > %
@ ` = ? \\ . .. -
"""
WORDS = PIECES.split()
ODD = (" ", "  ", "\t", ": ", ":", " #", "#", ", ", ",", "[", "]", '"', "'", "\x7f", "\xa0", "…")
BREAKS = ("\n", "\n", "\n  ", "\n- ", "\n  - ", "\n\n", "\r", "\x85", "\u2028", "\ufeff", "\ufffe")

#: Both that may be in use.
LOADERS = {yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)}

LINES = st.builds(
    lambda key, colon, value, end: key + colon + "".join(value) + end,
    st.sampled_from(KEYS),
    st.sampled_from([":", ": ", ":  "]),
    st.lists(st.sampled_from([*WORDS, *ODD]), max_size=4),
    st.sampled_from(["\n", "\n", *BREAKS]),
)
ITEMS = st.builds("{}{}\n".format, st.sampled_from(["- ", "  - ", " -"]), st.sampled_from(WORDS))
BLOCKS = st.lists(LINES | ITEMS, max_size=5).map("".join) | st.lists(
    st.sampled_from([*WORDS, *ODD, *BREAKS, *KEYS]), max_size=12
).map("".join)


def as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(BLOCKS)
@example("\ntitle: A title: and more\n")
@example("\ntags:\n- a\n  - b\n")
@example("\na: b\n  - c\n")
@example("\na: b\n c\n")
@example("\na: b\x85c: d\n")
@example("\na: b\x7fc\n")
@example("\na: [why?, b]\n")
@example(f"\n{'k' * 1100}: a\n")
@example("\na: 2024-01-02T24:00:00Z\n")
@example("\na: [b, 'c, d', \"e\", 1, 2024-01-02]\nb: null\nc:\n  - x\n  - /y\nd: 1\n")
def test_what_is_read_without_a_parser_is_what_yaml_reads(block: str):
    fields = plain_yaml.read(block)
    event("left to YAML" if fields is None else "read")
    if fields is not None:
        for loader in LOADERS:
            values = yaml.load(block, Loader=loader)
            # The text tells 1 from true, and the order of the keys.
            assert repr(fields) == repr(as_json(values or {}))


def test_the_usual_front_matter_is_read_without_a_parser():
    block = "\ntitle: It's a note: no, two\n"
    assert plain_yaml.read(block) is None
    block = (
        '\ntitle: "A: title"\ndate: 2026-01-02\ntags: [a, b1]\ndraft: false\nauthors:\n  - Ünal\n'
    )
    assert plain_yaml.read(block) == {
        "title": "A: title",
        "date": "2026-01-02",
        "tags": ["a", "b1"],
        "draft": False,
        "authors": ["Ünal"],
    }
