"""What happens in a watched folder is in the database soon after, whatever that is."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from watchdog.observers.inotify_c import (
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)

from helena_cli.batch import disk
from helena_cli.documents import watch, watch_folder
from helena_cli.documents.watch import Watcher
from helena_cli.documents.watch_events import Inbox, NativeObservation
from helena_cli.documents.watch_inotify import InotifyObservation
from helena_cli.errors import ConfigurationError, NamespaceClaimed
from helena_cli.settings import SpoolSettings
from tests.hosts import wait_until
from tests.watching import QUICK, Watching

pytestmark = pytest.mark.postgres


@pytest.fixture
def watching(helena_dsn: str, state_dir: Path, tmp_path: Path) -> Iterator[Watching]:
    folder = tmp_path / "docs"
    folder.mkdir()
    made = Watching(helena_dsn, state_dir, folder)
    yield made
    made.close()


def observation_of(watcher: Watcher) -> InotifyObservation:
    observation = watcher._folders[0]._observation
    assert isinstance(observation, InotifyObservation)
    return observation


def renewed(watcher: Watcher, old: InotifyObservation) -> bool:
    now = watcher._folders[0]._observation
    return now is not None and now is not old and now.is_alive()


def test_what_is_there_at_the_start_is_indexed(watching: Watching):
    for n in range(5):
        watching.write(f"sub{n}/a.md")
    watching.start()

    watching.wait_for_disk()


def test_a_save_a_change_and_a_deletion_arrive(watching: Watching):
    watching.start()
    file = watching.write("a.md", "# One")
    watching.wait_for_disk()
    file.write_text("# Two")
    watching.wait_for_disk()
    file.unlink()
    wait_until(lambda: watching.missing() == {"docs:a.md"}, "the deletion is marked")


def test_a_save_asks_nothing_of_the_database(watching: Watching):
    watching.start()
    before = watching.connections
    for n in range(5):
        watching.write(f"{n}.md")
        watching.wait_for_disk()

    assert watching.connections == before


def test_its_own_reads_do_not_keep_it_busy(watching: Watching):
    for n in range(20):
        watching.write(f"{n}.md")
    watcher = watching.start()
    watching.wait_for_disk()
    inbox = watcher._inbox

    for file in watching.folder.iterdir():
        file.read_text()
    marker = watching.write("marker.md")
    wait_until(lambda: "docs:marker.md" in watching.table(), "the marker")

    wait_until(lambda: watcher.state().changes[0].path == str(marker), "it is told")
    changes = [change.path for change in watcher.state().changes]
    assert changes.count(str(marker)) == 1
    assert inbox.take() == ({}, set())


# How programs save


def vim(file: Path, text: str) -> None:
    """With backup: move away, write anew, delete the backup; and the probe that it makes first."""
    probe, backup = file.with_name("4913"), file.with_name(f"{file.name}~")
    probe.touch()
    probe.unlink()
    if file.exists():
        file.rename(backup)
    with file.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    file.chmod(0o644)
    backup.unlink(missing_ok=True)


def atomically(file: Path, text: str) -> None:
    """Write beside it and rename: Obsidian on some systems, many scripts, `sed -i`."""
    other = file.with_name(f".{file.name}.tmp")
    other.write_text(text)
    other.replace(file)


def in_place(file: Path, text: str) -> None:
    """VS Code: truncate, then write in pieces."""
    with file.open("w") as handle:
        for start in range(0, len(text), 3):
            handle.write(text[start : start + 3])
            handle.flush()
            time.sleep(0.002)


def emacs(file: Path, text: str) -> None:
    """A lock link, a copy as backup, an autosave file, and the text written in place."""
    lock, autosave = file.with_name(f".#{file.name}"), file.with_name(f"#{file.name}#")
    lock.symlink_to("somebody@here.1:2")
    autosave.write_text(text)
    if file.exists():
        shutil.copy2(file, file.with_name(f"{file.name}~"))
    file.write_text(text)
    autosave.unlink()
    lock.unlink()


def anew(file: Path, text: str) -> None:
    """Delete, then write."""
    file.unlink(missing_ok=True)
    time.sleep(0.15)
    file.write_text(text)


@pytest.mark.parametrize("save", [vim, atomically, in_place, emacs, anew])
def test_a_session_of_an_editor_ends_with_its_last_text(
    watching: Watching, save: Callable[[Path, str], None]
):
    # A moment without the file is no deletion, however busy the machine is.
    watching.adjust(grace=10.0)
    watcher = watching.start()
    file = watching.folder / "notes.md"
    for n in range(8):
        save(file, f"# Session\n\nversion {n} {'and more ' * n}\n")
        time.sleep(0.03)
    watching.wait_for_disk()

    assert {change.change for change in watcher.state().changes} <= {"new", "changed"}
    assert set(watching.rows()) == {"docs:notes.md"}


def test_a_document_that_is_saved_on_and_on_arrives_meanwhile(watching: Watching):
    watching.start()
    file = watching.folder / "log.md"

    def saved() -> bool:
        with file.open("a") as handle:
            handle.write("one more line\n")
        return "docs:log.md" in watching.table()

    wait_until(saved, "it arrives although it never rests")
    watching.wait_for_disk()


# Folders


def test_whole_trees_are_moved_in_renamed_and_moved_out(watching: Watching, tmp_path: Path):
    watching.start()
    outside = tmp_path / "outside"
    for n in range(30):
        folder = outside / f"s{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.md").write_text(f"# {n}")
    outside.rename(watching.folder / "tree")
    watching.wait_for_disk()
    (watching.folder / "tree").rename(watching.folder / "wood")
    watching.wait_for_disk()
    assert len(watching.missing()) == 30
    (watching.folder / "wood").rename(outside)
    wait_until(lambda: not watching.table(), "all of them are missing")

    # What is written out there is not ours.
    (outside / "s0" / "new.md").write_text("# New")
    watching.write("last.md")
    watching.wait_for_disk()
    assert "docs:wood/s0/new.md" not in watching.rows()

    # Another one of that name is: at first, and afterwards.
    for name in ("one.md", "two.md"):
        watching.write(f"wood/s0/{name}")
        watching.wait_for_disk()
        time.sleep(QUICK.max_wait + QUICK.grace + QUICK.settle)


def test_a_tree_that_is_moved_in_again_is_watched_again(watching: Watching, tmp_path: Path):
    watching.start()
    watching.write("tree/a.md")
    watching.wait_for_disk()
    (watching.folder / "tree").rename(tmp_path / "away")
    wait_until(lambda: watching.missing() == {"docs:tree/a.md"}, "it is missing")
    (tmp_path / "away").rename(watching.folder / "back")
    watching.wait_for_disk()
    watching.write("back/b.md")
    watching.wait_for_disk()


def test_a_deep_tree_that_grows_at_once_is_complete(watching: Watching):
    watching.start()
    for n in range(40):
        watching.write(f"a{n}/b/c/d{n % 3}/deep.md", f"# {n}")

    watching.wait_for_disk()


def test_many_documents_that_are_seen_to_go_are_all_marked(watching: Watching):
    for n in range(40):
        watching.write(f"{n}.md")
    watching.start()
    watching.wait_for_disk()
    for n in range(39):
        (watching.folder / f"{n}.md").unlink()

    wait_until(lambda: len(watching.missing()) == 39, "all are marked, without a question")


@pytest.mark.parametrize("polling", ["auto", "always"])
def test_a_long_look_at_many_folders_gives_signs_of_life(
    watching: Watching, monkeypatch, polling: str
):
    signs, listed = 0, Counter[int]()
    live, scandir = Watcher._live, os.scandir

    def sign(watcher: Watcher) -> None:
        nonlocal signs
        signs += 1
        live(watcher)

    def listing(path):
        listed[signs] += 1
        return scandir(path)

    watching.adjust(polling=polling)
    for n in range(50):
        (watching.folder / f"{n}" / "without" / "documents").mkdir(parents=True)
    monkeypatch.setattr(Watcher, "_live", sign)
    monkeypatch.setattr(os, "scandir", listing)
    watching.start()

    # Each folder may be on a slow disk.
    assert listed.total() > 150
    assert max(listed.values()) < 5


def test_another_folder_is_not_taken_for_the_old_one_when_it_is_armed_at_the_second_try(
    watching: Watching, monkeypatch, tmp_path: Path
):
    for n in range(20):
        watching.write(f"{n}.md")
    watching.start()
    watching.wait_for_disk()
    broken = iter([PermissionError(errno.EACCES, "not now")])

    def file_system(path: Path) -> str:
        for error in broken:
            raise error
        return disk.file_system(path)

    monkeypatch.setattr(watch_folder, "file_system", file_system)
    watching.folder.rename(tmp_path / "old")
    watching.write("other.md")
    wait_until(lambda: "docs:other.md" in watching.table(), "the other folder is looked at")
    assert next(broken, None) is None
    watching.write("later.md")
    wait_until(lambda: "docs:later.md" in watching.table(), "it is observed")

    assert watching.missing() == set()


def test_an_end_while_a_folder_is_being_armed_leaves_nothing_out(watching: Watching, monkeypatch):
    watcher = watching.start()
    arming, start = threading.Event(), InotifyObservation.start

    def start_late(observation: InotifyObservation, progress: Callable[[], None]) -> None:
        arming.set()
        assert watcher._stopping.wait(10.0)
        start(observation, progress)

    monkeypatch.setattr(InotifyObservation, "start", start_late)
    observation_of(watcher).stop()
    assert arming.wait(10.0)
    watching.write("a.md")
    watcher.stop(10.0)

    assert watcher.unfinished == ""
    watching.wait_for_disk()


def test_a_link_changes_with_what_it_leads_to(watching: Watching):
    targets = [watching.write("AGENTS.md"), watching.write("sub/notes.txt")]
    (watching.folder / "README.md").symlink_to("AGENTS.md")
    (watching.folder / "notes.md").symlink_to("sub/notes.txt")
    watching.start()
    watching.wait_for_disk()
    for target in targets:
        target.write_text("# Changed\n")
    watching.wait_for_disk()
    for target in targets:
        atomically(target, "# Changed again\n")
    watching.wait_for_disk()


def test_a_folder_with_the_name_of_a_document_is_a_folder(watching: Watching, tmp_path: Path):
    for n in range(20):
        watching.write(f"notes.md/{n}.md")
    watching.write("other.md")
    watching.start()
    watching.wait_for_disk()
    (watching.folder / "notes.md").rename(tmp_path / "notes.md")

    wait_until(lambda: len(watching.missing()) == 20, "all in it are marked, without a question")


def test_a_folder_that_is_ignored_from_now_on_is_forgotten(watching: Watching):
    watching.write("private/a.md")
    watching.write("b.md")
    watching.start()
    watching.wait_for_disk()
    watching.write(".helenaignore", "private/\n")

    wait_until(lambda: watching.missing() == {"docs:private/a.md"}, "the ignored one is missing")
    (watching.folder / ".helenaignore").unlink()
    watching.wait_for_disk()
    watching.write("private/deep/c.md")
    watching.wait_for_disk()


def test_names_that_are_no_text_arrive_escaped(watching: Watching):
    watching.start()
    (watching.folder / os.fsdecode(b"caf\xe9.md")).write_text("# Caf\u00e9")
    wait_until(lambda: r"docs:caf\xe9.md" in watching.table(), "the name is escaped")
    (watching.folder / os.fsdecode(b"caf\xe9.md")).unlink()
    wait_until(lambda: watching.missing() == {r"docs:caf\xe9.md"}, "and found again")


def test_two_branches_that_differ_in_two_thousand_files_are_checked_out_in_turn(watching: Watching):
    if shutil.which("git") is None:
        pytest.skip("There is no git.")

    def git(*arguments: str) -> bytes:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "gc.auto=0"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=watching.folder, check=True, capture_output=True).stdout

    git("init", "-q", "-b", "one")
    for branch in ("one", "two"):
        for n in range(1000):
            watching.write(f"{branch}{n % 20}/{n}.md", f"# {branch} {n}")
            watching.write(f"both/{n % 100}.md", f"# {branch}")
        git("add", ".")
        git("commit", "-q", "-m", branch)
        if branch == "one":
            git("checkout", "-q", "-b", "two")
            git("rm", "-r", "-q", "one*")
    git("checkout", "-q", "one")
    assert len(git("diff", "--name-only", "--no-renames", "one", "two").splitlines()) >= 2000
    watching.start()
    watching.wait_for_disk()
    for branch in ("two", "one", "two"):
        git("checkout", "-q", branch)
    watching.wait_for_disk()


# What goes wrong


def test_a_root_that_goes_keeps_its_documents_and_is_watched_when_it_is_back(
    watching: Watching, tmp_path: Path
):
    watching.write("a.md")
    watching.write("b.md")
    watcher = watching.start()
    watching.wait_for_disk()
    watching.folder.rename(tmp_path / "away")
    wait_until(lambda: watcher.state().roots[0].mode == "away", "the root is away")
    (tmp_path / "away" / "c.md").write_text("# C")
    (tmp_path / "away").rename(watching.folder)
    watching.wait_for_disk()

    wait_until(lambda: watcher.state().roots[0].mode == "events", "that is told")
    assert watching.missing() == set()
    watching.write("d.md")
    watching.wait_for_disk()


def test_a_root_that_is_deleted_with_all_in_it_marks_nothing(watching: Watching):
    for n in range(5):
        watching.write(f"{n}.md")
    watcher = watching.start()
    watching.wait_for_disk()
    shutil.rmtree(watching.folder)
    wait_until(lambda: watcher.state().roots[0].mode == "away", "the root is away")
    time.sleep(QUICK.settle + QUICK.grace + 0.3)
    assert watching.missing() == set()

    watching.folder.mkdir()
    watching.write("new.md")
    wait_until(lambda: "docs:new.md" in watching.table(), "it is watched again")


def test_another_folder_in_place_of_a_root_marks_nothing_that_was_in_the_first(
    watching: Watching, tmp_path: Path
):
    for n in range(30):
        watching.write(f"{n}.md")
    watcher = watching.start()
    watching.wait_for_disk()
    other = tmp_path / "other"
    other.mkdir()
    (other / "new.md").write_text("# New")
    # Within the time of grace, so that the deletions have not been believed yet.
    shutil.rmtree(watching.folder)
    other.rename(watching.folder)
    wait_until(lambda: "docs:new.md" in watching.table(), "the other one is watched")
    wait_until(lambda: watcher.state().failure, "it is said")
    time.sleep(QUICK.settle + QUICK.grace + 0.3)

    assert watching.missing() == set()
    assert "30 known documents are missing, none was marked" in (watcher.state().failure or "")


@pytest.fixture
def mounted(watching: Watching) -> Iterator[Callable[[], None]]:
    """A file system below the watched folder, and how to take it away."""
    place = watching.folder / "mounted"
    place.mkdir()

    def mount(*command: str) -> None:
        subprocess.run([*command, str(place)], check=True, capture_output=True)

    try:
        mount("mount", "-t", "tmpfs", "none")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("Nothing can be mounted here.")
    yield lambda: mount("umount")
    if place.is_mount():
        mount("umount")


def test_what_is_not_mounted_any_more_is_not_taken_for_deleted(
    watching: Watching, mounted: Callable[[], None]
):
    for n in range(30):
        watching.write(f"mounted/{n}.md")
    watcher = watching.start()
    watching.wait_for_disk()
    mounted()
    watching.write("a.md")
    wait_until(lambda: "docs:a.md" in watching.table(), "the rest is watched")
    wait_until(lambda: watcher.state().failure, "it is said")
    time.sleep(QUICK.settle + QUICK.grace + 0.3)

    assert watching.missing() == set()


def test_what_is_mounted_meanwhile_is_watched(watching: Watching, tmp_path: Path):
    place, other = watching.folder / "mounted", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    (other / "a.md").write_text("# A")
    watching.start()
    bound = subprocess.run(["mount", "--bind", str(other), str(place)], capture_output=True)
    if bound.returncode:
        pytest.skip("Nothing can be mounted here.")
    try:
        wait_until(lambda: "docs:mounted/a.md" in watching.table(), "what was there")
        watching.write("mounted/b.md")
        wait_until(lambda: "docs:mounted/b.md" in watching.table(), "what comes")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_observation_that_has_died_is_started_again(watching: Watching, caplog):
    watcher = watching.start()
    watching.write("a.md")
    watching.wait_for_disk()
    for n in range(2):
        observation = observation_of(watcher)
        assert observation._source is not None
        observation._source.stop()
        watching.write(f"{n}.md")
        watching.wait_for_disk()
        wait_until(partial(renewed, watcher, observation), "a new observation")
        watching.write(f"after-{n}.md")
        watching.wait_for_disk()

    assert sum("ended by itself" in message for message in caplog.messages) == 2


def test_an_observation_that_keeps_dying_is_replaced_by_polling(watching: Watching):
    watcher = watching.start()

    def kill() -> bool:
        observation = watcher._folders[0]._observation
        if isinstance(observation, InotifyObservation) and observation._source is not None:
            observation._source.stop()
        return watcher.state().roots[0].mode == "polling"

    wait_until(kill, "it is polled")
    assert "keeps ending" in watcher.state().roots[0].reason
    watching.write("a.md")
    watching.wait_for_disk()


def test_lost_events_are_made_up_for(watching: Watching, monkeypatch, caplog):
    watching.write("a/0.md")
    for n in range(30):
        watching.write(f"gone{n}.md")
    watcher = watching.start()
    watching.wait_for_disk()
    # As after an overflow of the kernel's queue: what happens now is told to nobody.
    monkeypatch.setattr(Inbox, "put", lambda *_, **__: None)
    for n in range(30):
        (watching.folder / f"gone{n}.md").unlink()
        watching.write(f"a/{n}.md", f"# {n}")
    monkeypatch.undo()
    source = observation_of(watcher)._source
    assert source is not None
    overflow = Mask(InotifyConstants.IN_Q_OVERFLOW)
    source.handle_event(InotifyEvent(WatchDescriptor(-1), overflow, 0, b""))

    watching.wait_for_disk()
    assert any("were lost" in message for message in caplog.messages)


def test_too_few_watches_lead_to_polling_and_it_is_said(watching: Watching, monkeypatch, caplog):
    for n in range(10):
        watching.write(f"s{n}/a.md")
    monkeypatch.setattr(watch_folder, "max_watches", lambda: 5)
    watcher = watching.start()
    watching.wait_for_disk()

    assert watcher.state().roots[0].mode == "polling"
    assert "max_user_watches" in watcher.state().roots[0].reason
    assert any("max_user_watches" in message for message in caplog.messages)
    (watching.folder / "s1" / "a.md").unlink()
    watching.write("s2/a.md", "# Changed")
    watching.write("s11/new.md")
    watching.wait_for_disk()


@pytest.mark.parametrize("at_start", [True, False])
def test_a_folder_that_inotify_refuses_to_watch_leads_to_polling(
    watching: Watching, monkeypatch, at_start: bool
):
    real = InotifyFD.add_callback

    def add(self, path, *arguments):
        if path.endswith(b"one-too-many"):
            raise OSError(errno.ENOSPC, "inotify watch limit reached")
        return real(self, path, *arguments)

    monkeypatch.setattr(InotifyFD, "add_callback", add)
    if at_start:
        watching.write("a/one-too-many/b/0.md")
    watcher = watching.start()
    watching.write("a/one-too-many/b/1.md")
    watching.wait_for_disk()
    wait_until(lambda: watcher.state().roots[0].mode == "polling", "it is polled")
    assert "max_user_watches" in watcher.state().roots[0].reason
    watching.write("a/one-too-many/b/2.md")
    watching.wait_for_disk()


def test_ignored_folders_take_no_watches(watching: Watching):
    for n in range(20):
        watching.write(f"node_modules/{n}/readme.md")
        watching.write(f".git/objects/{n}/x.md")
    watching.write("a/b.md")
    watcher = watching.start()

    assert len(observation_of(watcher)._watches) == 2


def test_the_events_of_other_systems_serve_too(watching: Watching, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    watcher = watching.start()
    assert isinstance(watcher._folders[0]._observation, NativeObservation)
    file = watching.write("a/b.md")
    watching.wait_for_disk()
    file.write_text("# Changed")
    watching.wait_for_disk()
    (watching.folder / "a").rename(watching.folder / "c")
    watching.wait_for_disk()
    (watching.folder / "c" / "b.md").unlink()
    wait_until(lambda: not watching.table(), "it is missing")


@pytest.mark.parametrize("kind", ["nfs4", "9p"])
def test_a_file_system_that_tells_nothing_is_polled(watching: Watching, monkeypatch, kind: str):
    monkeypatch.setattr(watch_folder, "file_system", lambda path: kind)
    watcher = watching.start()
    watching.write("a.md")
    watching.wait_for_disk()

    assert watcher.state().roots[0].mode == "polling"
    assert kind in watcher.state().roots[0].reason


def test_a_polled_folder_that_is_empty_all_of_a_sudden_is_not_believed(
    watching: Watching, tmp_path: Path, caplog
):
    watching.adjust(polling="always")
    watching.write("sub/a.md")
    watching.write("sub/b.md")
    watcher = watching.start()
    watching.wait_for_disk()
    # At once: of a folder that empties one by one the first would be believed.
    (watching.folder / "sub").rename(tmp_path / "sub")
    wait_until(lambda: any("it is empty" in message for message in caplog.messages), "it is seen")
    time.sleep(QUICK.polling_interval * 2 + QUICK.settle + QUICK.grace)
    assert watching.missing() == set()

    (tmp_path / "sub").rename(watching.folder / "sub")
    watching.write("c.md")
    watching.wait_for_disk()
    wait_until(lambda: watcher.state().roots[0].mode == "polling", "it is polled again")


def test_a_polled_folder_is_observed_as_soon_as_that_is_possible(watching: Watching, monkeypatch):
    watching.adjust(rescan=1.0)
    monkeypatch.setattr(watch_folder, "max_watches", lambda: 0)
    watcher = watching.start()
    assert watcher.state().roots[0].mode == "polling"
    monkeypatch.undo()

    wait_until(lambda: watcher.state().roots[0].mode == "events", "it is observed")
    watching.write("a.md")
    watching.wait_for_disk()


def test_without_polling_only_a_full_look_finds_what_no_event_tells(
    watching: Watching, monkeypatch
):
    watching.adjust(polling="never", rescan=1.0)
    monkeypatch.setattr(
        InotifyObservation, "start", lambda *_: (_ for _ in ()).throw(OSError("no instances"))
    )
    watcher = watching.start()
    watching.write("a.md")
    watching.wait_for_disk()

    assert watcher.state().roots[0].mode == "polling"
    assert "no instances" in watcher.state().roots[0].reason


def test_an_unreadable_document_is_tried_again_then_reported(watching: Watching, monkeypatch):
    from helena_cli.documents import scan, watch_troubles

    real = scan.read
    monkeypatch.setattr(watch_troubles, "RETRIES", (0.1, 0.2))

    def read(found, *arguments, **options):
        if found.path == "bad.md":
            raise PermissionError(13, "Permission denied")
        return real(found, *arguments, **options)

    monkeypatch.setattr(scan, "read", read)
    watcher = watching.start()
    watching.write("good.md")
    bad = watching.write("bad.md")
    wait_until(
        lambda: [c for c in watcher.state().changes if c.change == "failed"], "it is reported"
    )
    assert watcher.state().failure == f"{bad}: Permission denied"
    wait_until(watching.table, "the other one is indexed")
    assert set(watching.table()) == {"docs:good.md"}

    monkeypatch.undo()
    os.utime(bad)
    watching.wait_for_disk()
    wait_until(lambda: watcher.state().failure is None, "it is over")


def test_a_turn_that_fails_does_not_end_the_watching(watching: Watching, monkeypatch, caplog):
    watcher = watching.start()
    broken = iter([RuntimeError("a bug")])

    def take(now, real=watcher._agenda.take_paths):
        for error in broken:
            raise error
        return real(now)

    monkeypatch.setattr(watcher._agenda, "take_paths", take)
    watching.write("a.md")
    watching.wait_for_disk()

    assert watcher.alive()
    assert any("a turn of the watcher failed" in message.lower() for message in caplog.messages)


# The database


def test_a_deletion_waits_for_the_database_and_everything_else_goes_on(
    proxy, helena_dsn: str, state_dir: Path, tmp_path: Path, caplog
):
    folder = tmp_path / "docs"
    folder.mkdir()
    watching = Watching(proxy.dsn, state_dir, folder, admin=helena_dsn)
    try:
        watching.write("old.md")
        watcher = watching.start()
        watching.wait_for_disk()
        proxy.stop()
        (folder / "old.md").unlink()
        for n in range(50):
            watching.write(f"{n}.md")
        runtime = watching._made[0][1]
        wait_until(lambda: runtime.spool.queue().total >= 50, "they are queued without it")
        wait_until(lambda: watcher.state().failure, "what waits is said")
        watching.write("later.md")
        wait_until(lambda: runtime.spool.queue().total >= 51, "one more is queued")
        assert watcher.state().failure
        assert "that is over" not in caplog.text
        proxy.start()
        watching.wait_for_disk()
        wait_until(lambda: watcher.state().failure is None, "it is over")
        assert watching.missing() == {"docs:old.md"}
    finally:
        watching.close()


def test_more_at_once_than_the_queue_has_room_for_comes_bit_by_bit(watching: Watching):
    watching.settings = replace(watching.settings, spool=SpoolSettings(max_bytes=1024 * 1024))
    for n in range(1200):
        watching.write(f"{n % 9}/{n}.md", f"# {n}\n" + "words " * 400)
    watcher = watching.start(looked=False)

    watching.wait_for_disk()
    wait_until(lambda: watcher.state().failure is None, "it is over")


def test_without_the_database_it_starts_and_goes_on_when_that_is_there(
    proxy, helena_dsn: str, state_dir: Path, tmp_path: Path
):
    folder = tmp_path / "docs"
    folder.mkdir()
    proxy.stop()
    watching = Watching(proxy.dsn, state_dir, folder, admin=helena_dsn)
    try:
        watching.write("a.md")
        watcher = watching.start(looked=False)
        wait_until(lambda: watcher.state().failure, "it says what is missing")
        assert "cannot be reached" in (watcher.state().failure or "")
        assert watcher.state().roots[0].mode == "away"
        proxy.start()
        watching.wait_for_disk()
    finally:
        watching.close()


def test_a_namespace_of_another_folder_ends_the_start(watching: Watching, tmp_path: Path):
    watching.start()
    other = tmp_path / "other" / "docs"
    other.mkdir(parents=True)

    with pytest.raises(NamespaceClaimed):
        watching.start(other, looked=False)


def test_what_others_changed_is_seen_at_a_rescan(watching: Watching):
    watching.adjust(rescan=1.0)
    watching.write("a.md")
    watching.start()
    watching.wait_for_disk()
    watching.admin.execute("DELETE FROM es_document_references")

    watching.wait_for_disk()


# New settings


def test_new_roots_are_watched_from_then_on(watching: Watching, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    watcher = watching.start()
    watcher.reconfigure([watching.folder, other], watching.settings)
    (other / "a.md").write_text("# A")
    wait_until(lambda: "other:a.md" in watching.table(), "the other root is indexed")
    watching.write("b.md")
    wait_until(lambda: "docs:b.md" in watching.table(), "and the first one still is")
    watcher.reconfigure([other], watching.settings)
    wait_until(lambda: len(watcher.state().roots) == 1, "one root is left")


def test_roots_that_cannot_be_used_leave_the_old_ones(watching: Watching, tmp_path: Path, caplog):
    other = tmp_path / "other" / "docs"
    other.mkdir(parents=True)
    watcher = watching.start()
    watcher.reconfigure([watching.folder, other], watching.settings)
    wait_until(
        lambda: any("old configuration stays" in message for message in caplog.messages),
        "it is refused",
    )
    watching.write("a.md")
    watching.wait_for_disk()
    assert len(watcher.state().roots) == 1


def test_a_root_that_comes_later_is_claimed_then(watching: Watching, tmp_path: Path):
    later = tmp_path / "later"
    documents = replace(watching.settings.documents, roots=(str(later),))
    watching.settings = replace(watching.settings, documents=documents)
    watcher = watching.start(watching.folder, later, looked=False)
    wait_until(lambda: watcher.state().roots, "it runs")
    later.mkdir()
    (later / "a.md").write_text("# A")

    wait_until(lambda: "later:a.md" in watching.table(), "it is indexed")


def test_an_ignore_file_that_cannot_be_used_ends_the_start(watching: Watching):
    watching.write(".helenaignore", "!\n")

    with pytest.raises(ConfigurationError):
        watching.start(looked=False)


# The end


@pytest.mark.parametrize("quick", [0.0, watch.QUICK], ids=["path by path", "all of it"])
def test_what_has_not_settled_is_looked_at_before_the_end(
    watching: Watching, monkeypatch, quick: float
):
    monkeypatch.setattr(watch, "QUICK", quick)
    watching.adjust(settle=60.0, max_wait=60.0, grace=60.0)
    gone = watching.write("gone.md")
    watcher = watching.start()
    watching.wait_for_disk()
    watching.write("late.md")
    gone.unlink()
    if not quick:
        wait_until(lambda: watcher.state().settling == 2, "both settle")
    watcher.stop(10.0)

    assert watcher.unfinished == ""
    watching.wait_for_disk()


def test_the_end_without_the_database_says_what_is_left(
    proxy, helena_dsn: str, state_dir: Path, tmp_path: Path
):
    folder = tmp_path / "docs"
    folder.mkdir()
    watching = Watching(proxy.dsn, state_dir, folder, admin=helena_dsn)
    try:
        for n in range(8):
            watching.write(f"{n}.md")
        watcher = watching.start()
        watching.wait_for_disk()
        proxy.stop()
        (folder / "0.md").unlink()
        watcher.stop(10.0)
        assert "cannot be reached" in watcher.unfinished
        proxy.start()
    finally:
        watching.close()
