"""Which paths concern documents, and which part of which root they belong to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helena_cli.documents.roots import Target, place
from helena_cli.documents.watch_scope import Scope
from helena_cli.settings import DocumentSettings

SETTINGS = DocumentSettings()


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "team").mkdir()
    return folder


def scope(
    *places: Path, known: Iterator[tuple[str, str]] | tuple[tuple[str, str], ...] = ()
) -> Scope:
    return Scope(place(places, SETTINGS, known), SETTINGS)


def within(targets: Iterator[Target]) -> dict[str, tuple[str, ...]]:
    return {target.folder.name: target.within for target in targets}


@pytest.mark.parametrize(
    ("path", "is_folder", "concerns"),
    [
        ("a.md", False, True),
        ("sub/b.markdown", False, True),
        ("a.md~", False, False),
        ("4913", False, False),
        ("picture.png", False, False),
        (".a.md.swp", False, False),
        (".git/notes.md", False, False),
        ("node_modules/x/readme.md", False, False),
        ("sub", True, True),
        ("new.folder", True, True),
        (".git", True, False),
        (".git/objects/ab", True, False),
        ("", True, True),
    ],
)
def test_only_documents_and_folders_that_may_hold_some_are_of_concern(
    docs: Path, path: str, is_folder: bool, concerns: bool
):
    assert scope(docs).concerns(str(docs / path), is_folder=is_folder) is concerns


def test_what_lies_outside_is_of_no_concern(docs: Path):
    assert not scope(docs).concerns(str(docs.parent / "docs2" / "a.md"), is_folder=False)
    assert not scope(docs).concerns(str(docs.parent / "a.md"), is_folder=False)


def test_of_a_root_only_the_watched_part_is_of_concern(docs: Path):
    watched = scope(docs / "sub", known=(("docs", str(docs)),))

    assert watched.concerns(str(docs / "sub" / "a.md"), is_folder=False)
    assert watched.concerns(str(docs / "sub"), is_folder=True)
    assert not watched.concerns(str(docs / "a.md"), is_folder=False)
    assert not watched.concerns(str(docs / "submarine" / "a.md"), is_folder=False)
    assert watched.folders() == [docs / "sub"]
    assert within(watched.parts([str(docs)])) == {"docs": ("sub",)}


def test_the_ignore_file_of_a_root_is_known(docs: Path):
    watched = scope(docs)

    assert watched.is_ignore_file(str(docs / ".helenaignore"))
    assert not watched.is_ignore_file(str(docs / "sub" / ".helenaignore"))


def test_a_path_belongs_to_the_innermost_root(docs: Path):
    watched = scope(docs, known=(("team", str(docs / "team")),))

    assert within(watched.parts([str(docs / "team" / "a.md")])) == {"team": ("a.md",)}
    assert within(watched.parts([str(docs / "sub" / "a.md")])) == {"docs": ("sub/a.md",)}
    # A folder that holds a root: both are concerned.
    assert within(watched.parts([str(docs)])) == {"docs": ("",), "team": ("",)}
    # One observation covers both.
    assert watched.folders() == [docs]
    assert within(watched.below(docs)) == {"docs": ("",), "team": ("",)}


def test_paths_that_one_of_them_contains_are_looked_at_once(docs: Path):
    paths = [str(docs / "sub" / name) for name in ("a.md", "b.md")]

    assert within(scope(docs).parts([*paths, str(docs / "sub")])) == {"docs": ("sub",)}


def test_what_a_link_leads_to_is_not_of_the_root(docs: Path):
    outside = docs.parent / "outside"
    outside.mkdir()
    (outside / "secret.md").write_text("# Secret")
    watched = scope(docs)
    (docs / "sub").rmdir()
    (docs / "sub").symlink_to(outside)

    assert within(watched.parts([str(docs / "sub" / "secret.md")])) == {}
