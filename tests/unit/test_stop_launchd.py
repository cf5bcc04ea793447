"""Stopping jobs of launchd: recorded command lines, for no launchd runs where these tests do.

The answers are those of launchctl on macOS 14, cut down to what Helena reads.
"""

import os
import plistlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helena_cli.errors import HelenaError
from helena_cli.host.processes import ended, find
from helena_cli.host.supervisors import Job, Wanted
from helena_cli.host.supervisors.launchd import Launchd
from tests.realtime import Process, Writers

LABEL = "org.example.writer"

LAUNCHCTL = r"""
echo "$*" >> "$D/calls"
case $1 in
list)
    printf 'PID\tStatus\tLabel\n-\t0\tcom.apple.other\n'
    [ -e "$D/loaded" ] && printf '%s\t0\torg.example.writer\n' "$(cat "$D/pid")"
    exit 0 ;;
print) [ -e "$D/loaded" ] || { echo "Could not find service" >&2; exit 113; } ;;
print-disabled)
    printf '\tdisabled services = {\n\t\t"com.apple.other" => enabled\n'
    [ -e "$D/disabled" ] && printf '\t\t"org.example.writer" => disabled\n'
    printf '\t}\n' ;;
disable) touch "$D/disabled" ;;
enable) rm -f "$D/disabled" ;;
bootout)
    [ -e "$D/forbidden" ] && { echo "Boot-out failed: 1: Operation not permitted" >&2; exit 1; }
    kill "$(cat "$D/pid")"; rm "$D/loaded"; exit 36 ;;
bootstrap)
    [ -e "$D/busy" ] && { rm "$D/busy"; echo "Bootstrap failed: 5: I/O error" >&2; exit 5; }
    touch "$D/loaded" ;;
*) exit 64 ;;
esac
"""


class Recorded:
    """A launchctl that notes what it is told, and the property list of one agent."""

    def __init__(self, folder: Path, argv: list[str]) -> None:
        self.folder = folder
        self.plist = folder / f"{LABEL}.plist"
        self.plist.write_bytes(
            plistlib.dumps({"Label": LABEL, "ProgramArguments": argv, "KeepAlive": True})
        )
        (folder / "broken.plist").write_text("<not a list>")
        program = folder / "launchctl"
        program.write_text(f"#!/bin/sh\nD='{folder}'\n{LAUNCHCTL}")
        program.chmod(0o755)
        self.launchd = Launchd([folder])

    def runs(self, process: Process) -> None:
        (self.folder / "loaded").touch()
        (self.folder / "pid").write_text(str(process.pid))

    def given(self, fact: str) -> None:
        (self.folder / fact).touch()

    def told(self) -> list[str]:
        """What it was told to change."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if not line.startswith(("list", "print"))]


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    found = Writers(tmp_path)
    yield found
    found.close()


@pytest.fixture
def launchctl(
    writers: Writers, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorded]:
    monkeypatch.setenv("PATH", f"{state_dir}:{os.environ['PATH']}")
    yield Recorded(state_dir, ["/usr/bin/python3", f"/opt/{writers.name('a')}.py", "--token", "x"])


def jobs(launchctl: Recorded, writers: Writers) -> list[Job]:
    wanted = Wanted((writers.name("a"),))
    return launchctl.launchd.jobs(wanted, find(wanted.processes))


GUI = f"gui/{os.geteuid()}"
TARGET = f"{GUI}/{LABEL}"


def test_a_loaded_agent_is_removed_and_disabled_through_the_recorded_launchctl(
    launchctl: Recorded, writers: Writers
):
    process = writers.writer("a")
    launchctl.runs(process)
    (job,) = jobs(launchctl, writers)
    assert (job.supervisor, job.name, job.pids) == ("launchd", LABEL, (process.pid,))
    assert job.command.endswith("--token ***")
    # Disabling lasts longer than a start of the machine: how to undo it is told.
    assert job.undo == f"launchctl enable {TARGET} && launchctl bootstrap {GUI} {launchctl.plist}"
    launchctl.launchd.hold(job, 1.0)
    assert launchctl.told() == [f"disable {TARGET}", f"bootout {TARGET}"]
    process.wait(10)
    assert jobs(launchctl, writers) == []


def test_release_enables_and_loads_it_again_through_the_recorded_launchctl(
    launchctl: Recorded, writers: Writers
):
    launchctl.runs(writers.writer("a"))
    (job,) = jobs(launchctl, writers)
    launchctl.launchd.hold(job, 1.0)
    # As long as the old one is still being removed.
    launchctl.given("busy")
    launchctl.launchd.release(job)
    load = f"bootstrap {GUI} {launchctl.plist}"
    assert launchctl.told()[2:] == [f"enable {TARGET}", load, load]
    launchctl.launchd.release(job)
    assert launchctl.told()[5:] == [f"enable {TARGET}"]


def test_an_agent_that_is_not_loaded_but_would_be_is_disabled_in_the_recorded_launchctl(
    launchctl: Recorded, writers: Writers
):
    (job,) = jobs(launchctl, writers)
    launchctl.launchd.hold(job, 1.0)
    assert launchctl.told() == [f"disable {TARGET}"]
    launchctl.launchd.release(job)
    assert launchctl.told() == [f"disable {TARGET}", f"enable {TARGET}"]


def test_an_agent_that_was_disabled_before_stays_so_in_the_recorded_launchctl(
    launchctl: Recorded, writers: Writers
):
    launchctl.runs(writers.writer("a"))
    launchctl.given("disabled")
    (job,) = jobs(launchctl, writers)
    launchctl.launchd.hold(job, 1.0)
    launchctl.launchd.release(job)
    assert launchctl.told() == [f"bootout {TARGET}", f"bootstrap {GUI} {launchctl.plist}"]


def test_what_the_recorded_launchctl_does_not_permit_is_told_with_a_remedy(
    launchctl: Recorded, writers: Writers
):
    process = writers.writer("a")
    launchctl.runs(process)
    launchctl.given("forbidden")
    (job,) = jobs(launchctl, writers)
    with pytest.raises(HelenaError, match="Operation not permitted") as caught:
        launchctl.launchd.hold(job, 1.0)
    assert "sudo launchctl bootout" in caught.value.remedy
    assert not ended(find([writers.name("a")])[0].process)


def test_where_there_is_no_launchctl_there_are_no_jobs(
    writers: Writers, state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(state_dir))
    assert Launchd([state_dir]).jobs(Wanted((writers.name("a"),)), []) == []
