"""Whatever a file holds and is called, it becomes a row that PostgreSQL stores."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helena_cli.batch.operation import encode
from helena_cli.documents import front_matter
from helena_cli.documents.extract import Document, Source, document_id, extract
from helena_cli.documents.names import escape, unescape
from helena_cli.settings import DocumentSettings

#: Pieces that YAML, TOML and JSON are made of, and a few of everything else.
WORDS = """
[ ] { } , : a b title tags - ? ! !!set !!int !!bool !!timestamp !!binary !!omap &a *a <<: ' "
| > .inf .nan 1e999 0x 2024-01-01 # ]( [[ <http:// = a.b.c= x= true ~ 99999999999999999999 é %YAML
\\u0000 \\ud800
"""
LINES = ("---\n", "+++\n", "...\n", "{\n", "}\n", "```\n", "===\n", "\n", "\n  ", ">\n", "|\n")
ODD = (" ", ": ", "- ", "? ", "\0", "\r", "\t", "\ud800")
PIECES = (*WORDS.split(), *LINES, *ODD)


def of(content: bytes, path: str = "note.md") -> Document:
    source = Source("docs", path, content, len(content), "0" * 64, 1, 2, 3)
    return extract(source, DocumentSettings())


def check(document: Document) -> dict[str, Any]:
    """The row as PostgreSQL would get it: valid, bounded, and plain JSON."""
    encoded = encode("insert", "es_document_references", document.row, max_bytes=500_000)
    row: dict[str, Any] = json.loads(encoded, parse_constant=pytest.fail)
    assert not any("\0" in text for text in texts(row))
    assert row["metadata"]["title"]
    assert row["data_classification"] in ("public", "confidential", "internal", "restricted")
    assert len(row["tags"]) == len(set(row["tags"]))
    return row


def texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, the keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)


@given(st.binary(max_size=3000))
def test_any_bytes_become_a_row(content: bytes):
    check(of(content))


@given(st.text(max_size=1000), st.sampled_from(["utf-8", "utf-16", "utf-32", "cp1252"]))
def test_any_text_becomes_a_row(text: str, encoding: str):
    check(of(text.encode(encoding, "replace")))


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["---\n", "+++\n", "{\n"]), st.lists(st.sampled_from(PIECES), max_size=60))
@example("---\n", ["? ", "&a ", "[", "*a", "]", "\n"])
def test_anything_that_looks_like_front_matter_becomes_a_row(fence: str, pieces: list[str]):
    text = fence + "".join(pieces) + "\n" + fence.replace("{", "}") + "body\n"
    check(of(text.encode("utf-8", "surrogatepass")))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.binary(max_size=20)
    | st.dates()
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4)
        | st.sets(st.integers() | st.text("abc", max_size=3), max_size=4)
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=5), VALUES, max_size=5))
def test_sound_yaml_loses_no_field(values: dict[str, Any]):
    text = f"---\n{yaml.safe_dump(values, allow_unicode=True)}---\nbody\n"
    row = check(of(text.encode()))
    assert row["metadata"].get("extraction_error") is None
    found = row["metadata"]["front_matter"]
    assert found.keys() == values.keys()
    for key, value in values.items():
        if isinstance(value, str | bool | None):
            assert found[key] == value


@given(st.lists(st.sampled_from(["title: x", "# Head", "---", "text", "", "[a](b)"]), max_size=12))
def test_the_style_of_newlines_does_not_matter(lines: list[str]):
    rows = [check(of(newline.join(lines).encode())) for newline in ("\n", "\r\n", "\r")]
    for row in rows:
        del row["file_size"]
    assert rows[0] == rows[1] == rows[2]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=500))
def test_splitting_never_invents_text(text: str):
    assert front_matter.split(text).body in text


NAMES = st.binary(min_size=1, max_size=60).map(os.fsdecode) | st.text(
    st.sampled_from("ax\\/e9u\udce9\ud800é"), max_size=12
)


@given(NAMES)
@example("\\xe9")
@example("\udce9")
def test_an_escaped_name_is_text_and_leads_back(name: str):
    escaped = escape(name)
    escaped.encode()
    assert unescape(escaped) == name


@given(st.text("abü/", max_size=2000), st.text("abü/", max_size=2000))
def test_two_paths_never_share_an_identifier(one: str, other: str):
    same = document_id("docs", one) == document_id("docs", other)
    assert same == (one == other)
    assert len(document_id("docs", one).encode()) < 2000
