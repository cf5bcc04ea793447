"""Reading with more processes: the same answers in the same order, whatever becomes of those."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from helena_cli.documents import crew
from helena_cli.documents.candidate import Answer, Candidate, Chunk, Root
from helena_cli.documents.crew import Crew
from helena_cli.documents.filter import Filter
from helena_cli.documents.reader import Reader
from helena_cli.documents.scan import Found, walk
from helena_cli.settings import DocumentSettings
from tests.hosts import PROJECT, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")

SETTINGS = DocumentSettings(preview_chars=100_000)

Answered = list[tuple[str, Answer]]
Watch = Callable[[int], None]


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more processes, from the beginning, and each with little to do at once."""
    monkeypatch.setattr(crew, "ALONE", 1)
    monkeypatch.setattr(crew, "CHUNK", 4)
    monkeypatch.setattr(crew, "DEPTH", 2)
    monkeypatch.setattr(crew, "_processors", lambda: 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """Deep folders, small files and large ones, and a few that cannot be read."""
    folder = tmp_path_factory.mktemp("notes")
    for number in range(1500):
        place = folder / f"{number // 300}" / ("deep" * 50) / ("down" * 50)
        place.mkdir(parents=True, exist_ok=True)
        size = 20_000 if number % 10 == 0 else 10
        (place / f"{number:05}.md").write_text(f"# Note {number}\n\n" + "word " * size)
    (folder / "0" / "pipe.md").symlink_to("nowhere")
    return Root("notes", str(folder), str(folder))


@pytest.fixture(scope="module")
def candidates(root: Root) -> list[Candidate]:
    found = walk(Path(root.folder), "", documents=Filter(Path(root.folder), SETTINGS))
    candidates = [Candidate(one, "new") for one in found if isinstance(one, Found)]
    gone = Found(f"{root.folder}/gone.md", "gone.md", 1, 1, 1)
    barred = Found(f"{root.folder}/{'x' * 300}.md", "barred.md", 1, 1, 1)
    return [
        *candidates[:100],
        *(Candidate(one, "new") for one in (gone, barred)),
        *candidates[100:],
    ]


def read(
    root: Root,
    candidates: list[Candidate],
    *,
    alone: bool = False,
    watch: Watch = lambda count: None,
) -> Answered:
    """What the crew says of each, in its order; `watch` is called with the number of each."""
    answered: Answered = []
    with Crew(
        SETTINGS, lambda _, one, said: answered.append((one.found.path, said)), alone=alone
    ) as c:
        for number, candidate in enumerate(candidates):
            watch(number)
            c.read(root, candidate)
        c.finish(root)
    return answered


def timeless(answered: Answered) -> list[object]:
    """Without the times at which the files were read."""
    told: list[object] = []
    for path, said in answered:
        row = dict(said.document.row) if said.document else {"metadata": {}}
        row["metadata"] = {**row["metadata"], "read_ns": 0}
        row["indexed_at"] = ""
        told.append((path, row, said.reason, said.unchanged, said.weight))
    return told


@pytest.fixture(scope="module")
def expected(root: Root, candidates: list[Candidate]) -> list[object]:
    return timeless(read(root, candidates, alone=True))


def readers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and "reader" in " ".join(process.cmdline())
    ]


def both_wait_for_work() -> bool:
    """Whether the two processes have started."""
    return [process.status() for process in readers()] == [psutil.STATUS_SLEEPING] * 2 and all(
        any("_hashlib" in part.path for part in process.memory_maps()) for process in readers()
    )


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    yield
    assert readers() == []


def test_more_processes_give_the_same_answers_in_the_same_order(
    root: Root, candidates: list[Candidate], expected: list[object]
):
    def watch(number: int) -> None:
        if number == 50:
            wait_until(both_wait_for_work, "two processes")

    assert timeless(read(root, candidates, watch=watch)) == expected
    answers = dict(read(root, candidates))
    assert answers["gone.md"] == Answer()
    assert answers["barred.md"].reason


def test_a_killed_process_loses_nothing(
    root: Root, candidates: list[Candidate], expected: list[object]
):
    killed: list[int] = []

    def watch(number: int) -> None:
        if number == 30:
            wait_until(both_wait_for_work, "two processes")
        if number in (300, 700):
            # One while it is at work, the other later: then it goes on without.
            process = readers()[0]
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    assert timeless(read(root, candidates, watch=watch)) == expected
    assert len(killed) == 2


@pytest.mark.parametrize("program", ["/nonexistent", "/bin/false", ""])
def test_where_no_process_can_be_started_it_reads_alone(
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    root: Root,
    candidates: list[Candidate],
    expected: list[object],
):
    monkeypatch.setattr(sys, "executable", program)
    assert timeless(read(root, candidates)) == expected


def test_an_error_in_the_middle_leaves_no_process_behind(root: Root, candidates: list[Candidate]):
    def watch(number: int) -> None:
        if number == 400:
            wait_until(readers, "a process")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(root, candidates, watch=watch)


def test_a_few_files_are_read_without_more_processes(
    monkeypatch: pytest.MonkeyPatch, root: Root, candidates: list[Candidate]
):
    def nobody(number: int) -> None:
        assert number % 100 or readers() == []

    monkeypatch.setattr(crew, "ALONE", 1000)
    read(root, candidates[:999], watch=nobody)
    monkeypatch.setattr(crew, "ALONE", 1)
    monkeypatch.setattr(crew, "_processors", lambda: 1)
    read(root, candidates, watch=nobody)


def test_it_may_be_given_much_before_its_answers_are_taken(root: Root, candidates: list[Candidate]):
    reader = Reader(SETTINGS)
    try:
        chunks = [Chunk(root, candidates[start : start + 100]) for start in range(0, 1500, 100)]
        for chunk in chunks:
            reader.give(chunk)
        while reader.chunks:
            reader.look(wait=True)
        assert all(len(chunk.answers or ()) == 100 for chunk in chunks)
    finally:
        reader.close()


#: Has two readers, and hangs.
PARENT = """
import os, sys, time
from helena_cli.documents import reader
from helena_cli.settings import DocumentSettings
two = [reader.Reader(DocumentSettings()) for _ in range(2)]
for one in two:
    one.look(wait=True)
print("ready", flush=True)
time.sleep(600)
"""


def test_they_end_with_whoever_started_them_even_after_kill_9(tmp_path: Path):
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], env=environ, stdout=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        assert parent.stdout and parent.stdout.readline() == b"ready\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.kill()
        wait_until(lambda: not any(map(is_running, children)), "their end")


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
