"""Stopping the real-time writers, and keeping them stopped: apply a plan, and see whether it holds.

A supervisor's job is stopped through its supervisor, which is kept from starting it again. Then the
processes that are left are ended with everything they started. What comes back within the quiet
time is asked who started it, and that is held too.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
from msgspec import Struct

from helena_cli.errors import HelenaError
from helena_cli.host.argv import program
from helena_cli.host.masking import masked_command
from helena_cli.host.processes import (
    Ending,
    Running,
    ancestors,
    command_line,
    end,
    ended,
    find,
    is_launcher,
    may_signal,
    own_line,
    tree,
)
from helena_cli.host.restarting import remembered
from helena_cli.host.stop_plan import Plan, make_plan, obstacle, supervisors
from helena_cli.host.stop_record import HeldJob, Record, StoppedProcess
from helena_cli.host.supervisors import Job, Wanted, strangers

log = logging.getLogger(__name__)

#: Seconds between two looks for what comes back.
LOOK = 0.3

#: How often something may come back before it is left to the person.
ROUNDS = 3


class Stopped(Struct, frozen=True):
    """A process that has ended."""

    pid: int
    command: str
    result: str


class Failure(Struct, frozen=True):
    """Something that could not be stopped, and what to do about it."""

    what: str
    reason: str
    remedy: str


@dataclass
class Report:
    """What was done."""

    stopped: list[Stopped] = field(default_factory=list)
    disabled: list[Job] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remaining: int = 0


class Stopping:
    """One run of `apply`: ends what the plan holds, then watches until it stays quiet."""

    def __init__(
        self, plan: Plan, wanted: Wanted, record: Record, *, grace: float, quiet: float
    ) -> None:
        self._plan = plan
        self._wanted = wanted
        self._record = record
        self._grace = grace
        self._quiet = quiet
        self._supervisors = supervisors()
        self._held: set[tuple[str, str, str, str]] = set()
        self._failed: set[tuple[str, str, str, str]] = set()
        #: What was above each process that was stopped, its parent first.
        self._lines: dict[int, list[psutil.Process]] = {}
        #: Those that no supervisor runs.
        self._loose: set[int] = set()
        self._first = frozenset(running.process for running in plan.found)
        self._known = set(self._first)
        self._report = Report()

    def apply(self) -> Report:
        """Stop everything that can be stopped from here, and look whether it stays so."""
        self._stop(self._plan)
        if self._report.stopped or self._report.disabled:
            self._keep_watch()
        self._sum_up()
        return self._report

    def _stop(self, plan: Plan) -> None:
        trees = {running.pid: tree(running.process) for running in plan.found}
        for running in plan.found:
            self._lines[running.pid] = ancestors(running.process)
        self._loose |= {one.pid for one in plan.found if plan.job_of(one.pid) is None}
        own = own_line()
        for job in plan.jobs:
            # Its supervisor would end this command with it.
            if not own.intersection(job.pids):
                self._hold(job)
        targets = [one for one in plan.found if self._may_end(one, plan.job_of(one.pid))]
        for running in targets:
            # The child of another target is started again by that one.
            inside = any(parent.pid in trees for parent in self._lines[running.pid])
            if plan.job_of(running.pid) is None and not inside:
                self._remember(running.process)
        # A supervisor may end the first of a tree only.
        endings = end(
            {p.pid: p for one in targets for p in trees[one.pid]}.values(), grace=self._grace
        )
        for running in targets:
            self._tell(running, endings.get(running.pid, Ending.ENDED))

    def _may_end(self, running: Running, job: Job | None) -> bool:
        if job is not None and job.key in self._failed and job.supervisor != "cron":
            return False  # its supervisor would start it again at once
        return obstacle(running, job) is None

    def _hold(self, job: Job) -> None:
        entry = HeldJob(job)
        self._record.add(entry)
        try:
            self._supervisors[job.supervisor].hold(job, self._grace)
        except HelenaError as error:
            self._failed.add(job.key)
            what = f"{job.supervisor} {job.name}"
            self._report.failures.append(Failure(what, str(error), error.remedy))
            log.info("%s was not held: %s", what, error)
            if self._unchanged(job):
                self._record.remove(entry)
            return
        self._held.add(job.key)
        self._report.disabled.append(job)
        log.info("%s %s is held", job.supervisor, job.name)

    def _unchanged(self, job: Job) -> bool:
        jobs = self._supervisors[job.supervisor].jobs(self._wanted, find(self._wanted.processes))
        return any(other.key == job.key and other.facts == job.facts for other in jobs)

    def _remember(self, process: psutil.Process) -> None:
        entry = remembered(process)
        if entry is not None:
            # What came back is the same once more; two that ran side by side are two.
            if process in self._first or not self._record.knows(entry):
                self._record.add(entry)
        elif not ended(process):
            command = masked_command(command_line(process))
            self._report.notes.append(f"--undo cannot start this again, do it by hand: {command}")

    def _tell(self, running: Running, ending: Ending) -> None:
        command = masked_command(running.argv)
        if ending in (Ending.ENDED, Ending.KILLED):
            self._report.stopped.append(Stopped(running.pid, command, str(ending)))
            log.info("pid %d %s: %s", running.pid, ending, command)
            return
        reason = (
            "it waits inside the kernel, for a disk or a network file system"
            if ending is Ending.ALIVE
            else f"it belongs to {running.user}"
        )
        remedy = (
            "It ends as soon as that answers; look again later."
            if ending is Ending.ALIVE
            else f"Run the same command as {running.user} or as root."
        )
        self._report.failures.append(Failure(f"pid {running.pid}", reason, remedy))

    # What comes back

    def _keep_watch(self) -> None:
        """Look for the quiet time whether something comes back; then begin anew."""
        deadline, rounds = time.monotonic() + self._quiet, 0
        while time.monotonic() < deadline:
            time.sleep(LOOK)
            back = [one for one in find(self._wanted.processes) if self._is_new(one)]
            if not back:
                continue
            rounds += 1
            if rounds > ROUNDS:
                for running in back:
                    self._blame(running, "it comes back again and again; who starts it is unknown")
                return
            self._known |= {one.process for one in back}
            self._stop_again(back)
            deadline = time.monotonic() + self._quiet

    def _is_new(self, running: Running) -> bool:
        return running.process not in self._known and may_signal(running.uid)

    def _stop_again(self, back: Sequence[Running]) -> None:
        """Hold who started these: their job, or the process that started them before, too."""
        plan = make_plan(self._wanted)
        jobs = [job for job in plan.jobs if job.key not in self._held | self._failed]
        left = []
        for running in back:
            if plan.job_of(running.pid) is None and self._stop_starter(running, plan.found):
                continue
            left.append(running)
        self._stop(Plan(tuple(left), tuple(jobs)))

    def _stop_starter(self, running: Running, found: Sequence[Running]) -> bool:
        """End the process that has started this one again; whether the matter is settled."""
        before = {one for line in self._lines.values() for one in line}
        starter = next((one for one in ancestors(running.process) if one in before), None)
        if starter is None or starter.pid == 1:
            return False
        argv = command_line(starter)
        command = masked_command(argv)
        if not self._may_end_starter(starter, found):
            self._blame(running, f"pid {starter.pid}{_place(starter)}, starts it again: {command}")
            self._forget_children(starter)
            return True
        run = program(argv)
        if run.script or run.module or run.text:
            self._remember(starter)
            self._forget_children(starter)
        else:
            self._report.notes.append(f"--undo cannot start this loop of a shell again: {command}")
        log.info("pid %d starts it again: %s", starter.pid, command)
        again = f"pid {starter.pid} had started it again, and was ended too: {command}"
        self._report.notes.append(again)
        endings = end(tree(starter), grace=self._grace)
        for one in (Running(starter, "", argv, running.uid, running.user), running):
            self._tell(one, endings.get(one.pid, Ending.ENDED))
        return True

    def _forget_children(self, starter: psutil.Process) -> None:
        """It starts them itself, when it runs: nobody else has to."""
        children = {pid for pid, line in self._lines.items() if starter in line}
        for entry in self._record.entries():
            if isinstance(entry, StoppedProcess) and entry.pid in children:
                self._record.remove(entry)

    def _may_end_starter(self, starter: psutil.Process, found: Sequence[Running]) -> bool:
        """Not a person's shell, no service that carries other things, nobody else's process."""
        try:
            uid = starter.uids().real
        except psutil.Error:
            return False
        return (
            is_launcher(starter)
            and may_signal(uid)
            and starter.pid not in own_line()
            and not strangers(starter, found)
        )

    def _blame(self, running: Running, reason: str) -> None:
        remedy = "Stop what starts it there, then run the same command again."
        self._report.failures.append(Failure(f"pid {running.pid}", reason, remedy))

    def _sum_up(self) -> None:
        """What still runs, and who may start something again later."""
        told = {failure.what for failure in self._report.failures}
        plan = make_plan(self._wanted)
        for running in plan.found:
            job = plan.job_of(running.pid)
            if job is not None and job.key in self._failed:
                continue
            self._report.remaining += 1
            if f"pid {running.pid}" not in told:
                reason = obstacle(running, job) or "it still runs"
                self._blame(running, reason)
        self._report.remaining += len(self._failed)
        parents = {self._lines[pid][0] for pid in self._loose if self._lines[pid]}
        for parent in sorted(parents, key=lambda one: one.pid):
            if not ended(parent) and is_launcher(parent) and parent.pid not in own_line():
                command = masked_command(command_line(parent))
                self._report.notes.append(
                    f"pid {parent.pid} had started it and still runs, it may do so again: {command}"
                )


def _place(process: psutil.Process) -> str:
    """The terminal at which somebody started it."""
    try:
        terminal = process.terminal()
    except psutil.Error:
        return ""
    return f", at the terminal {terminal}" if terminal else ""
