"""After any operations on a tree of folders, the table equals the disk."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hosts import wait_until
from tests.watching import Watching

pytestmark = pytest.mark.postgres

FOLDERS = st.sampled_from(["", "a", "a/b", "c", "c/d/e", "f"])
NAMES = st.sampled_from(["1.md", "2.md", "x y.md", "\u00fcber.md", "no.txt"])
TEXTS = st.text(alphabet="abc# \n", max_size=20)


def write(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)


def replace(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    other = aside / "new"
    other.write_text(text)
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    other.replace(path / name)


def delete(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    (root / folder / name).unlink(missing_ok=True)


def rename(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path = root / folder / name
    if path.exists():
        path.rename(path.with_name("2.md" if len(text) % 2 else "3.md"))


def remove_folder(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    if folder:
        shutil.rmtree(root / folder, ignore_errors=True)


def rename_folder(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path, other = root / folder, root / f"moved{len(text) % 3}"
    if folder and path.exists():
        shutil.rmtree(other, ignore_errors=True)
        path.rename(other)


def move_out(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path = root / folder
    if folder and path.exists():
        shutil.rmtree(aside / "out", ignore_errors=True)
        path.rename(aside / "out")


def move_in(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path = root / folder
    if folder and (aside / "out").exists() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        (aside / "out").rename(path)


def touch(root: Path, aside: Path, folder: str, name: str, text: str) -> None:
    path = root / folder / name
    if path.exists():
        os.utime(path)


Change = Callable[[Path, Path, str, str, str], None]
CHANGES: list[Change] = [
    *(write, write, write, replace, delete, rename, touch),
    *(remove_folder, rename_folder, move_out, move_in),
]
STEP = st.tuples(st.sampled_from(CHANGES), FOLDERS, NAMES, TEXTS)


@pytest.fixture
def watching(helena_dsn: str, state_dir: Path, tmp_path: Path) -> Iterator[Watching]:
    (tmp_path / "docs").mkdir()
    (tmp_path / "aside").mkdir()
    made = Watching(helena_dsn, state_dir, tmp_path / "docs")
    made.start()
    yield made
    made.close()


@settings(
    max_examples=4,
    deadline=None,
    # What a disk and its events do does not repeat exactly, so nothing can be made smaller.
    phases=[Phase.generate],
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEP, min_size=100, max_size=100), rest=st.integers(0, 100))
def test_after_a_hundred_operations_the_table_equals_the_disk(
    watching: Watching, tmp_path: Path, steps: list[tuple[Change, str, str, str]], rest: int
):
    root, aside = watching.folder, tmp_path / "aside"
    # Something is there, so that the folder never looks like one that is not mounted.
    write(root, aside, "keep", "this.md", "# Kept")
    for number, (change, folder, name, text) in enumerate(steps):
        change(root, aside, folder, name, text)
        if number == rest:
            # Some of it is in the table, some comes at once.
            wait_until(lambda: "docs:keep/this.md" in watching.table(), "the first documents")

    watching.wait_for_disk()
