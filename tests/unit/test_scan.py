"""Finding documents in a folder and reading them, whatever else lies there."""

import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from helena_cli.documents.extract import TEXT_BYTES
from helena_cli.documents.filter import Filter
from helena_cli.documents.names import escape, unescape
from helena_cli.documents.roots import default_namespace, place
from helena_cli.documents.scan import Found, Unreadable, look, read, walk
from helena_cli.errors import ConfigurationError
from helena_cli.settings import DocumentSettings

needs_posix = pytest.mark.skipif(os.name != "posix", reason="file names and modes as of POSIX")


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def walked(root: Path, within: str = "", **settings: Any) -> list[str]:
    """The paths found under a root."""
    documents = Filter(root, DocumentSettings(**settings))
    found = list(walk(root, within, documents=documents))
    assert not any(isinstance(item, Unreadable) for item in found)
    return [item.path for item in found]


def only(root: Path, within: str) -> Found:
    (found,) = look(root, within)
    return found


# Names


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("plain.md", "plain.md"),
        ("ünï \N{OWL}\n.md", "ünï \N{OWL}\n.md"),
        ("caf\udce9.md", r"caf\xe9.md"),
        (r"caf\xe9.md", r"caf\x5cxe9.md"),
        ("\ud800", r"\ud800"),
    ],
)
def test_names_become_text_and_back(name: str, escaped: str):
    assert escape(name) == escaped
    assert unescape(escaped) == name


def test_a_namespace_has_no_colon_and_is_never_empty():
    assert default_namespace(Path("/a/b:c")) == r"b\x3ac"
    assert default_namespace(Path("/")) == "root"


# Walking


def test_documents_are_found_in_order_with_their_facts(tmp_path: Path):
    for name in ("b.md", "a.md", "B/z.md", "a/y.Markdown", "a/x.MD", "a.txt", "md", "x.mdx"):
        write(tmp_path / name, name.encode())
    assert walked(tmp_path) == ["a.md", "b.md", "B/z.md", "a/x.MD", "a/y.Markdown"]
    found = only(tmp_path, "a/x.MD")
    facts = (tmp_path / "a/x.MD").stat()
    assert found == Found(
        str(tmp_path / "a/x.MD"), "a/x.MD", 6, facts.st_mtime_ns, facts.st_ctime_ns
    )


def test_the_extensions_are_a_setting(tmp_path: Path):
    for name in ("a.md", "b.rst", "c.TXT"):
        write(tmp_path / name)
    assert walked(tmp_path, extensions=(".rst", ".txt")) == ["b.rst", "c.TXT"]


def test_a_part_of_a_root_has_paths_relative_to_the_root(tmp_path: Path):
    write(tmp_path / "a/b/c.md")
    write(tmp_path / "a/d.md")
    assert walked(tmp_path, "a/b") == ["a/b/c.md"]


def test_other_roots_are_left_out(tmp_path: Path):
    write(tmp_path / "a/b/c.md")
    write(tmp_path / "a/d.md")
    documents = Filter(tmp_path, DocumentSettings())
    others = frozenset({str(tmp_path / "a/b")})
    assert [f.path for f in walk(tmp_path, "", documents=documents, others=others)] == ["a/d.md"]


def test_a_folder_that_vanishes_is_empty(tmp_path: Path):
    assert walked(tmp_path, "never") == []
    write(tmp_path / "file.md")
    assert walked(tmp_path, "file.md/x") == []


def test_very_deep_folders_are_walked(tmp_path: Path):
    """Without recursion; beyond the limit of the system the folder is reported."""
    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(400):
            os.mkdir("deeperdeeper")
            os.chdir("deeperdeeper")
            Path("x.md").write_text("x")
    finally:
        os.chdir(home)
    documents = Filter(tmp_path, DocumentSettings())
    found = list(walk(tmp_path, "", documents=documents))
    assert len([f for f in found if isinstance(f, Found)]) > 200
    assert len([f for f in found if isinstance(f, Unreadable)]) == 1
    os.chdir(tmp_path)
    try:
        os.system("rm -rf deeperdeeper")
    finally:
        os.chdir(home)


# Ignoring


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ((), ["a.md", "sub/b.md", "sub/c.md", "sub/sub/d.md", ".h/e.md"]),
        ((".*",), ["a.md", "sub/b.md", "sub/c.md", "sub/sub/d.md"]),
        (("sub",), ["a.md", ".h/e.md"]),
        (("/sub/",), ["a.md", ".h/e.md"]),
        (("b.md",), ["a.md", "sub/c.md", "sub/sub/d.md", ".h/e.md"]),
        (("sub/*", "!sub/c.md"), ["a.md", "sub/c.md", ".h/e.md"]),
        (("sub/sub/",), ["a.md", "sub/b.md", "sub/c.md", ".h/e.md"]),
        (("**/sub/*.md",), ["a.md", ".h/e.md"]),
        (("# b.md", "", "[ab].md"), ["sub/c.md", "sub/sub/d.md", ".h/e.md"]),
    ],
)
def test_patterns_follow_gitignore(tmp_path: Path, patterns: tuple[str, ...], left: list[str]):
    for name in ("a.md", "sub/b.md", "sub/c.md", "sub/sub/d.md", ".h/e.md"):
        write(tmp_path / name)
    assert sorted(walked(tmp_path, ignore=patterns)) == sorted(left)
    documents = Filter(tmp_path, DocumentSettings(ignore=patterns))
    # A single path is judged just as when everything is walked.
    for name in ("a.md", "sub/b.md", "sub/c.md", "sub/sub/d.md", ".h/e.md"):
        assert documents.ignores_any_part(name) == (name not in left)


def test_what_the_old_programs_left_is_ignored_whatever_the_settings(tmp_path: Path):
    for folder in ("helena_batch_pending", "x/helena_tasks/batch_queue", "sql/realtime_updates"):
        write(tmp_path / folder / "a.md")
    write(tmp_path / "sql/b.md")
    assert walked(tmp_path, ignore=()) == ["sql/b.md"]


@needs_posix
def test_names_that_are_no_text_can_be_ignored(tmp_path: Path):
    write(Path(os.fsdecode(bytes(tmp_path) + b"/secret-\xe9.md")))
    write(tmp_path / r"back\slash.md")
    assert walked(tmp_path, ignore=("secret*", r"back\\slash.md")) == []


def test_a_bad_pattern_in_the_settings_is_named(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"\[documents\] ignore.*'\[z-a\]'"):
        Filter(tmp_path, DocumentSettings(ignore=("fine", "[z-a]")))


def test_an_ignore_folder_is_no_ignore_file(tmp_path: Path):
    write(tmp_path / ".helenaignore/x")
    write(tmp_path / "a.md")
    assert walked(tmp_path) == ["a.md"]


# Reading


def test_a_document_is_read_with_its_facts(tmp_path: Path):
    write(tmp_path / "a.md", b"content")
    source = read(only(tmp_path, "a.md"), "docs", max_bytes=100)
    assert source is not None
    assert (source.namespace, source.path, source.content) == ("docs", "a.md", b"content")
    assert source.sha256 == hashlib.sha256(b"content").hexdigest()
    assert source.modified_ns == (tmp_path / "a.md").stat().st_mtime_ns
    assert source.read_ns >= source.modified_ns


@pytest.mark.parametrize("size", [0, 1, TEXT_BYTES - 1, TEXT_BYTES, TEXT_BYTES + 1, 3_000_000])
def test_files_of_all_sizes_are_hashed_whole_and_kept_in_part(tmp_path: Path, size: int):
    content = os.urandom(size)
    write(tmp_path / "a.md", content)
    source = read(only(tmp_path, "a.md"), "docs", max_bytes=2_000_000)
    assert source is not None
    assert (source.size, source.sha256) == (size, hashlib.sha256(content).hexdigest())
    assert source.content == (b"" if size > 2_000_000 else content[:TEXT_BYTES])


def test_a_huge_file_is_read_in_bounded_memory(tmp_path: Path):
    with (tmp_path / "huge.md").open("wb") as file:
        file.truncate(200 * 1024 * 1024)
    found = only(tmp_path, "huge.md")
    tracemalloc.start()
    read(found, "docs", max_bytes=10**9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * TEXT_BYTES


def test_a_document_that_vanished_is_none(tmp_path: Path):
    found = only(tmp_path, write(tmp_path / "a/b.md").relative_to(tmp_path).as_posix())
    (tmp_path / "a/b.md").unlink()
    assert read(found, "docs", max_bytes=100) is None
    (tmp_path / "a").rmdir()
    assert read(found, "docs", max_bytes=100) is None
    write(tmp_path / "a")
    assert read(found, "docs", max_bytes=100) is None


@needs_posix
@pytest.mark.timeout(10)
def test_a_pipe_in_place_of_the_document_does_not_block(tmp_path: Path):
    found = only(tmp_path, write(tmp_path / "a.md").name)
    (tmp_path / "a.md").unlink()
    os.mkfifo(tmp_path / "a.md")
    assert read(found, "docs", max_bytes=100) is None


@needs_posix
def test_a_link_in_place_of_the_document_is_not_followed(tmp_path: Path):
    secret = write(tmp_path / "secret.txt", b"secret")
    found = only(tmp_path, write(tmp_path / "a.md").name)
    (tmp_path / "a.md").unlink()
    (tmp_path / "a.md").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        read(found, "docs", max_bytes=100)


def test_a_file_that_grows_is_read_to_the_size_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "a.md", b"first")
    found = only(tmp_path, "a.md")
    read_some = os.read

    def read_and_grow(descriptor: int, count: int) -> bytes:
        with (tmp_path / "a.md").open("ab") as file:
            file.write(b" and more")
        return read_some(descriptor, count)

    monkeypatch.setattr(os, "read", read_and_grow)
    source = read(found, "docs", max_bytes=100)
    assert source is not None
    assert source.content == b"first"


# Roots


def targets(*paths: Path, known: tuple[tuple[str, str], ...]) -> list[tuple[str, tuple[str, ...]]]:
    found = place(paths, DocumentSettings(), known)
    return [(target.namespace, target.within) for target in found]


def test_the_innermost_root_owns_a_path(tmp_path: Path):
    write(tmp_path / "a/b/c/d.md")
    known = (("outer", str(tmp_path)), ("inner", str(tmp_path / "a/b")))
    assert targets(tmp_path / "a/b/c/d.md", known=known) == [("inner", ("c/d.md",))]
    assert targets(tmp_path / "a", known=known) == [("outer", ("a",)), ("inner", ("",))]
    assert targets(tmp_path / "x.md", known=known) == [("outer", ("x.md",))]


def test_the_home_directory_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "r/~x.md")
    known = (("r", str(tmp_path / "r")),)
    assert targets(Path("~/r"), known=known) == [("r", ("",))]
    monkeypatch.chdir(tmp_path / "r")
    assert targets(Path("~x.md"), known=known) == [("r", ("~x.md",))]


def test_of_paths_in_one_another_the_outer_one_counts(tmp_path: Path):
    for name in ("r/a/x.md", "r/a-b/x.md", "r/b/x.md"):
        write(tmp_path / name)
    known = (("r", str(tmp_path / "r")),)
    paths = [tmp_path / "r" / name for name in ("a/x.md", "a-b/x.md", "a", "b/x.md", "b/x.md")]
    assert targets(*paths, known=known) == [("r", ("a-b/x.md", "a", "b/x.md"))]
    assert targets(*paths, tmp_path / "r", known=known) == [("r", ("",))]
