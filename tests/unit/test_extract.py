"""One file becomes one row: front matter, encodings, rules, and everything that can be wrong."""

import hashlib
import pickle
from datetime import datetime
from typing import Any

import pytest

from helena_cli.batch.operation import encode
from helena_cli.documents import block
from helena_cli.documents.extract import TEXT_BYTES, Document, Source, document_id, extract
from helena_cli.documents.rules import compile_rules
from helena_cli.errors import ConfigurationError
from helena_cli.settings import DocumentSettings, PathRule, Rules, TagRule, TypeRule

READ_NS = 1_700_000_000_000_000_000


def of(content: bytes | str, path: str = "a/note.md", **settings: Any) -> Document:
    if isinstance(content, str):
        content = content.encode()
    source = Source(
        namespace="docs",
        path=path,
        content=content[:TEXT_BYTES],
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        modified_ns=1,
        changed_ns=2,
        read_ns=READ_NS,
    )
    document = extract(source, DocumentSettings(**settings))
    encode("insert", "t", document.row, max_bytes=8 * 1024 * 1024)
    return document


def metadata(content: bytes | str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = of(content, **settings).row["metadata"]
    return found


def fields(content: bytes | str) -> dict[str, Any]:
    found: dict[str, Any] = metadata(content)["front_matter"]
    return found


def test_the_row_of_a_plain_document():
    document = of(
        "---\ntitle: A title\nauthor: Me\nurl: https://x.y/z\ntags: [one, two]\n---\n"
        "# Heading\n\nSome [text](other.md) here.\n"
    )
    assert document.error is None
    row = dict(document.row)
    facts = row.pop("metadata")
    assert datetime.fromisoformat(row.pop("indexed_at")).timestamp() == READ_NS / 1e9
    assert len(row.pop("sha256")) == 64
    assert row == {
        "es_index": "osint_reports_pdf",
        "es_doc_id": "docs:a/note.md",
        "doc_type": "general_documentation",
        "issuer": "Me",
        "report_url": "https://x.y/z",
        "filename": "note.md",
        "file_size": 109,
        "data_classification": "public",
        "investigation_id": "general",
        "tags": ["one", "two", "markdown"],
    }
    assert facts == {
        "namespace": "docs",
        "path": "a/note.md",
        "title": "A title",
        "preview": "# Heading\n\nSome [text](other.md) here.",
        "line_count": 9,
        "word_count": 5,
        "links": ["other.md"],
        "front_matter": {
            "title": "A title",
            "author": "Me",
            "url": "https://x.y/z",
            "tags": ["one", "two"],
        },
        "modified_ns": 1,
        "changed_ns": 2,
        "read_ns": READ_NS,
    }


def test_every_row_has_the_same_columns():
    """So that they are written by one statement, and a value that is gone becomes null."""
    assert of("---\nauthor: x\n---").row.keys() == of(b"\xff\0").row.keys()


def test_documents_can_be_extracted_in_another_process():
    document = of("# x")
    assert pickle.loads(pickle.dumps(document)) == document


# Front matter


@pytest.mark.parametrize(
    "text",
    [
        "---\ntitle: T\n---\nbody",
        "---\ntitle: T\n...\nbody",
        "\n\n---  \ntitle: T\n-----\nbody",
        "+++\ntitle = 'T'\n+++\nbody",
        '{\n"title": "T"\n}\nbody',
        "\ufeff---\ntitle: T\n---\nbody",
        "---\r\ntitle: T\r\n---\r\nbody",
        "---\rtitle: T\r---\rbody",
    ],
)
def test_front_matter_in_all_its_forms(text: str):
    facts = metadata(text)
    assert facts["front_matter"] == {"title": "T"}
    assert facts["preview"] == "body"


@pytest.mark.parametrize(
    "text",
    [
        "---\nprose\n---\nmore",
        "---\n- a\n- list\n---\nmore",
        "---\ntitle: never closed\n",
        "----\n\n",
        "no front matter\n---\nx: y\n---",
        "{\nnever closed",
        "--- not a rule",
        "...\ntitle: x\n---\nmore",
        "",
    ],
)
def test_what_is_no_front_matter_is_text(text: str):
    document = of(text)
    assert document.error is None
    assert document.row["metadata"]["front_matter"] == {}
    assert document.row["metadata"]["preview"] == text.strip()


def test_an_empty_block_is_empty_front_matter():
    assert metadata("---\n# only a comment\n---\nbody")["preview"] == "body"


@pytest.mark.parametrize(
    "block",
    [
        "title: [unclosed",
        "a: b: c",
        "date: 2024-13-45",
        "at: 2024-01-01 00:00:00 +99:99",
        "x: !!timestamp never",
        "x: !!bool maybe",
        'x: !!int ""',
        "x: !!python/object:os.system y",
        "? [a]\n: list as a key",
        "x: \x01",
        "x: *nowhere",
        "x: " + "9" * 5000,
        "<<: 3",
        "x: '" + "y" * 70_000 + "'",
    ],
)
def test_broken_yaml_is_an_error_and_still_a_document(block: str):
    document = of(f"---\n{block}\n---\nbody text")
    assert document.error is not None
    assert document.error.startswith("front matter: ")
    assert document.row["metadata"]["extraction_error"] == document.error
    assert (
        "body text" in metadata(f"---\n{block}\n---\nbody text", preview_chars=100_000)["preview"]
    )


@pytest.mark.parametrize(
    "text",
    [
        "+++\nx = \n+++\nbody",
        "+++\nd = 2024-13-45\n+++\nbody",
        f"+++\n{'.'.join('a' * 32_000)} = 1\n+++\nbody",
        f"+++\nx = {'[' * 5000}\n+++\nbody",
        "{\n'x': 1\n}\nbody",
        f'{{\n"x": {"[" * 30_000}\n}}\nbody',
    ],
)
@pytest.mark.timeout(10)
def test_broken_toml_and_json_are_errors_too(text: str):
    document = of(text)
    assert document.error is not None
    assert document.row["filename"] == "note.md"


@pytest.mark.parametrize("block", ["[" * 60_000, "- " * 30_000, "? " * 30_000, "{a: " * 15_000])
def test_nesting_that_would_end_the_process_is_refused(block: str):
    """libyaml recurses in C; the limit is checked before."""
    document = of(f"---\n{block}\n---\nbody")
    assert document.error is not None


def test_deep_nesting_of_one_value_costs_only_that_value():
    deep = "".join(f"{' ' * level}k:\n" for level in range(1, 100))
    document = of(f"---\ntitle: T\ndeep:\n{deep}last: x\n---\n")
    assert document.error == "front matter: deep is nested too deeply, or contains itself"
    assert document.row["metadata"]["front_matter"] == {"title": "T", "last": "x"}


def test_the_error_of_broken_yaml_names_the_line_of_the_file():
    error = of("---\nauthor: me\ntitle: [never closed\n---\ntext\n").error
    assert error is not None
    assert "at line 3, column 8" in error
    assert "unicode string" not in error


def test_front_matter_that_contains_itself_is_cut():
    document = of("---\ntitle: T\nx: &x [*x]\ny: &y {z: *y}\n---\n")
    assert document.error is not None
    assert document.row["metadata"]["front_matter"] == {"title": "T"}


def test_aliases_cannot_make_megabytes():
    lines = ["title: T", "a: &a [x,x,x,x,x,x,x,x,x]"]
    for name, before in zip("bcdefgh", "abcdefg", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
    document = of("---\n{}\n---\n".format("\n".join(lines)))
    assert document.error == "front matter: more than 64 KiB as JSON, cut off there"
    assert document.title == "T"
    assert len(encode("insert", "t", document.row, max_bytes=100_000)) < 100_000


def test_merge_keys_cannot_multiply():
    lines = ["a: &a {{{}}}".format(",".join(f"k{number}: 1" for number in range(10)))]
    for name, before in zip("bcdefgh", "abcdefg", strict=True):
        lines.append(f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}")
    nested = of("---\n{}\n---\n".format("\n".join(lines)))
    # Some versions of the parser know each key once; with the others the block is refused.
    assert nested.error is not None or len(nested.row["metadata"]["front_matter"]["h"]) == 10
    keys = ",".join(f"k{number}: 1" for number in range(200))
    wide = [f"a: &a {{{keys}}}", *(f"b{number}: {{<<: *a}}" for number in range(100))]
    assert of("---\n{}\n---\n".format("\n".join(wide))).error is not None
    many = "a: &a {x: 1}\nb: {" + ", ".join(["<<: *a"] * 100) + "}"
    assert of(f"---\n{many}\n---\n").error is not None


def test_an_ordinary_merge_key_merges():
    assert fields("---\na: &a {x: 1}\nb: {<<: *a, y: 2}\n---\n")["b"] == {"x": 1, "y": 2}


def test_values_become_json():
    text = """---
date: 2024-01-02
at: 2024-01-02 03:04:05
zoned: 2024-01-02T03:04:05+02:00
first: 0001-01-01 00:00:00 +10:00
set: !!set {b, a}
data: !!binary aGVsbG8=
inf: .inf
nan: .nan
huge: 1.0e+999
big: 123456789012345678901234567890
bits: 0xffffffffffffffffffffffffff
pairs: !!pairs [a: 1, a: 2]
none:
"""
    sexagesimal = ":".join(["1"] * 3000)
    assert fields(f"{text}long: {sexagesimal}\n---")["long"].startswith("0x")
    assert fields(f"{text}---\n") == {
        "date": "2024-01-02",
        "at": "2024-01-02T03:04:05",
        "zoned": "2024-01-02T03:04:05+02:00",
        "first": "0001-01-01T00:00:00+10:00",
        "set": ["a", "b"],
        "data": "aGVsbG8=",
        "inf": "inf",
        "nan": "nan",
        "huge": "inf",
        "big": "123456789012345678901234567890",
        "bits": str(0xFFFFFFFFFFFFFFFFFFFFFFFFFF),
        "pairs": [["a", 1], ["a", 2]],
        "none": None,
    }


def test_keys_become_text():
    text = "---\n2024: a\nyes: b\n~: c\n1.5: d\n2024-01-02: e\n? !!binary aGk=\n: f\n---\n"
    assert fields(text) == {
        "2024": "a",
        "true": "b",
        "null": "c",
        "1.5": "d",
        "2024-01-02": "e",
        "aGk=": "f",
    }


def test_keys_that_confuse_other_readers_are_kept():
    assert fields("---\ncontent: a\nhandler: b\n---\n") == {"content": "a", "handler": "b"}


def test_of_duplicate_keys_the_last_one_counts():
    assert fields("---\na: 1\na: 2\n---\n") == {"a": 2}


def test_toml_and_json_values_become_json_too():
    assert fields("+++\nd = 2024-01-02\nt = 03:04:05\nx = nan\n+++\n") == {
        "d": "2024-01-02",
        "t": "03:04:05",
        "x": "nan",
    }
    assert fields('{\n"a": NaN, "b": -Infinity, "c": "\\u0000 \\ud800"\n}\n') == {
        "a": "nan",
        "b": "-inf",
        "c": "\ufffd \ufffd",
    }


# Encodings


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("# Ünï".encode(), "Ünï"),
        ("\ufeff# Ünï".encode(), "Ünï"),
        ("\ufeff# Ünï".encode("utf-16-le"), "Ünï"),
        ("\ufeff# Ünï".encode("utf-16-be"), "Ünï"),
        ("\ufeff# Ünï".encode("utf-32-le"), "Ünï"),
        ("\ufeff# Ünï".encode("utf-32-be"), "Ünï"),
    ],
)
def test_unicode_in_its_encodings_is_no_error(content: bytes, title: str):
    document = of(content)
    assert (document.title, document.error) == (title, None)


@pytest.mark.parametrize(
    ("content", "title", "error"),
    [
        (b"# caf\xe9 \x80", "café €", "not UTF-8 (byte 5), read as Windows-1252"),
        (b"# caf\xe9 \x81", "café \x81", "not UTF-8 (byte 5), read as Latin-1"),
        (b"\xff\xfe#\0 \0x\0\0\xd8", "x\ufffd", "broken UTF-16"),
        (b"# one\0two and more", "one\ufffdtwo and more", "it contains NUL characters"),
        (bytes(range(256)), "note", "a binary file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "note", "a binary file"),
        (b"\0" * 1000, "note", "a binary file"),
        (b"\xe9\x01\x02\x03\x04\x05", "note", "a binary file"),
    ],
)
def test_a_wrong_encoding_is_named(content: bytes, title: str, error: str):
    document = of(content)
    assert (document.title, document.error) == (title, error)
    if error == "a binary file":
        assert document.row["metadata"]["preview"] == ""


def test_a_long_document_is_read_in_part_and_says_so():
    """The limit may fall into a character."""
    document = of("x" * (TEXT_BYTES - 1) + "ü and more")
    assert document.error is None
    assert document.row["metadata"]["analysed_bytes"] == TEXT_BYTES
    assert "analysed_bytes" not in metadata("x" * TEXT_BYTES)


def test_a_document_over_the_limit_is_not_read():
    document = of("# Title\n" * 100, max_bytes=799)
    assert document.title == "note"
    assert document.error == "larger than max_bytes (799 bytes): not read as text"
    assert document.row["metadata"]["preview"] == ""
    assert of("# Title\n" * 100, max_bytes=800).error is None


@pytest.mark.parametrize(
    ("text", "lines", "words"),
    [("", 0, 0), ("one two", 1, 2), ("one\ntwo\n", 2, 2), ("---\na: b\n---\none\n", 4, 1)],
)
def test_lines_of_the_file_and_words_of_the_text_are_counted(text: str, lines: int, words: int):
    assert (metadata(text)["line_count"], metadata(text)["word_count"]) == (lines, words)


def test_the_preview_has_the_wanted_length():
    assert metadata("abc", preview_chars=2)["preview"] == "ab"
    assert metadata("abc", preview_chars=0)["preview"] == ""


# Titles and links


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("---\ntitle: Front\n---\n# Heading", "Front"),
        ("---\nTitle: Front\n---\n", "Front"),
        ("---\ntitle: 2024\n---\n", "2024"),
        ("---\ntitle: |\n  two\n  lines\n---\n", "two lines"),
        ("---\ntitle:\n---\n# Heading", "Heading"),
        ("---\ntitle: no\n---\n# Heading", "Heading"),
        ("---\ntitle: {a: b}\n---\n# Heading", "Heading"),
        ("text\n\n### Third ###\n", "Third"),
        ("# C#\n", "C#"),
        ("#hashtag\n#\n# \n", "note"),
        ("Underlined\n===\n", "Underlined"),
        ("```\n# code\n```\n# Heading", "Heading"),
        ("~~~~ sh\n# code\n~~~\n# code\n~~~~\n# Heading", "Heading"),
        ("```\n# never closed", "note"),
        ("", "note"),
        ("# " + "x" * 5000, "x" * 1000),
    ],
)
def test_the_title(text: str, title: str):
    assert of(text).title == title


def test_a_file_without_a_stem_has_a_title():
    assert of("", path=".md").title == ".md"


def test_links_are_listed_once_and_bounded():
    text = "[a](x.md) ![b](y.png 'title') [c](<z.md>) [d](x.md) [[Page|name]] <https://e.f/g> [e]()"
    assert metadata(text)["links"] == ["x.md", "y.png", "z.md", "Page", "https://e.f/g"]
    assert len(metadata("".join(f"[x]({n})" for n in range(500)))["links"]) == 100


@pytest.mark.parametrize(
    "text",
    [
        "[" * 500_000,
        "](" * 300_000,
        "](x" * 300_000,
        "<http://" * 100_000,
        "[[x" * 300_000,
        "# " + "#" * 900_000 + "x",
        "=" * 900_000,
        "`" * 900_000,
        "x\n" * 400_000,
        " " * 900_000 + "x",
        "-" * 900_000 + "x",
        "---\n" * 200_000,
    ],
)
@pytest.mark.timeout(20)
def test_no_text_takes_more_than_linear_time(text: str):
    of(text)


# Columns


def test_issuer_and_url_come_from_the_front_matter():
    row = of("---\nissuer: I\nauthor: A\nreport_url: R\nurl: U\n---\n").row
    assert (row["issuer"], row["report_url"]) == ("I", "R")
    assert of("---\nauthor: [A, B]\n---\n").row["issuer"] == "A, B"
    assert of("---\nauthor: {name: A}\n---\n").row["issuer"] is None


def test_values_of_indexed_columns_are_bounded():
    row = of(
        f"---\nauthor: {'x' * 5000}\ninvestigation: {'x' * 5000}\ntags: [{'x' * 500}]\n---"
    ).row
    assert len(row["issuer"]) == len(row["investigation_id"]) == 500
    assert len(row["tags"][0]) == 200


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("[b, a, b]", ["b", "a"]),
        ("b, a  c, ,b", ["b", "a  c"]),
        ("b a  b", ["b", "a"]),
        ("'#b #a'", ["b", "a"]),
        ("[2024, 1.5, no, ~, [x], {y: z}]", ["2024", "1.5"]),
        ("{a: b}", []),
        ("2024", ["2024"]),
        ("", []),
        ("[markdown]", []),
    ],
)
def test_tags_of_all_kinds(tags: str, expected: list[str]):
    assert of(f"---\ntags: {tags}\n---\n").row["tags"] == [*expected, "markdown"]


def test_tags_by_content():
    tags = of("PostgreSQL performance is CRITICAL in batches").row["tags"]
    assert tags == ["markdown", "postgresql", "performance", "critical", "batch-processing"]


def test_the_number_of_tags_is_bounded():
    assert len(of(f"---\ntags: {list(range(1000))}\n---\n").row["tags"]) == 101


@pytest.mark.parametrize(
    ("name", "text", "doc_type"),
    [
        ("The-PROCESS.md", "", "protocol"),
        ("tutorial-protocol.md", "", "protocol"),
        ("user_guide.md", "", "guide"),
        ("agents.md", "", "team_documentation"),
        ("report.md", "", "analysis"),
        ("summary.md", "", "status_report"),
        ("design.md", "", "architecture"),
        ("api.md", "", "api_documentation"),
        ("commit.md", "", "commit"),
        ("x.md", "A Protocol and its procedure", "protocol"),
        ("x.md", "a protocol only", "general_documentation"),
        ("x.md", "the agent's responsibility", "team_documentation"),
        ("x.md", "System design", "architecture"),
        ("x.md", "nothing", "general_documentation"),
    ],
)
def test_document_types(name: str, text: str, doc_type: str):
    assert of(text, path=f"report/{name}").row["doc_type"] == doc_type


def test_rules_can_be_replaced():
    rules = Rules(
        types=(TypeRule("number", name=r"^\d+\."), TypeRule("pair", content=("a|b|c", "d"))),
        default_type="other",
        tags=(TagRule("t", content="x.z"),),
        investigations=(PathRule("first", "^a/"), PathRule("second", "a")),
        default_investigation="none",
        classifications=(PathRule("internal", "secret"),),
    )
    row = of("xyz", path="a/12.md", rules=rules).row
    assert (row["doc_type"], row["tags"], row["investigation_id"]) == ("number", ["t"], "first")
    row = of("c d", path="b/secret/a.md", rules=rules).row
    assert (row["doc_type"], row["tags"], row["investigation_id"]) == ("pair", [], "second")
    assert row["data_classification"] == "internal"
    row = of("c", path="x.md", rules=rules).row
    assert (row["doc_type"], row["investigation_id"]) == ("other", "none")


def test_the_front_matter_names_the_investigation():
    assert of("---\ninvestigation: I\n---\n").row["investigation_id"] == "I"
    assert of("---\ninvestigation_id: 7\n---\n").row["investigation_id"] == "7"


def test_the_front_matter_names_the_classification():
    assert of("---\nclassification: Restricted\n---\n").row["data_classification"] == "restricted"
    assert of("---\ndata_classification: internal\n---").row["data_classification"] == "internal"


def test_an_unknown_classification_is_not_silently_public():
    document = of("---\nclassification: top secret\n---\n")
    assert document.row["data_classification"] == "public"
    assert document.error == "unknown classification 'top secret', taken as public"


def test_a_rule_cannot_ask_for_an_unknown_classification():
    with pytest.raises(ConfigurationError):
        compile_rules(Rules(classifications=(PathRule("secret", "x"),)))


def test_identifiers_are_stable_and_fit_into_an_index():
    assert document_id("docs", "a/b.md") == "docs:a/b.md"
    long = [document_id("docs", "x" * 3000 + name) for name in ("a", "b")]
    assert long[0] != long[1]
    assert all(len(identifier.encode()) < 2000 for identifier in long)
    assert len(document_id("docs", "ü" * 3000).encode()) < 2000
    # One that is kept whole can never look like one that was shortened.
    assert len(long[0].encode()) > len(document_id("d", "x" * 1398).encode()) == 1400


def test_two_problems_are_both_told():
    document = of(b"---\nclassification: x\n---\n\xe9")
    assert document.error is not None
    assert "Windows-1252" in document.error
    assert "classification" in document.error


def test_clean_leaves_ordinary_text_alone():
    text = "ünï \N{OWL}\t\n"
    assert block.clean(text) == text
    assert block.clean("a\0b\ud800c") == "a\ufffdb\ufffdc"
