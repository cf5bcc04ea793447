"""What `helena stop-realtime` would stop: processes, and the jobs that would start them again."""

from msgspec import Struct

from helena_cli.host.masking import masked_command
from helena_cli.host.processes import Running, find, may_signal, own_line, tree
from helena_cli.host.supervisors import Job, Supervisor, Wanted
from helena_cli.host.supervisors.cron import Cron
from helena_cli.host.supervisors.launchd import Launchd
from helena_cli.host.supervisors.supervisord import Supervisord
from helena_cli.host.supervisors.systemd import Systemd


def supervisors() -> dict[str, Supervisor]:
    """Every kind that is known, by the name that its jobs carry."""
    systemd = Systemd()
    return {
        # First, so that nothing is started while the others are being stopped.
        "cron": Cron(),
        "systemd": systemd,
        "systemd --user": systemd,
        "launchd": Launchd(),
        "supervisord": Supervisord(),
    }


class Item(Struct, frozen=True):
    """A line of the plan: a process, or a job that runs none now."""

    pid: int | None
    command: str
    user: str | None
    supervisor: str | None
    job: str | None
    #: How many processes it has started.
    children: int
    #: Why it cannot be stopped from here.
    obstacle: str | None


class Plan(Struct, frozen=True):
    """What was found; nothing has been changed."""

    found: tuple[Running, ...]
    jobs: tuple[Job, ...]

    def job_of(self, pid: int) -> Job | None:
        """The job that runs this process."""
        return next((job for job in self.jobs if pid in job.pids), None)

    def items(self) -> list[Item]:
        """Processes first, then the jobs that run none of them."""
        lines = [self._item(running) for running in self.found]
        lines += [
            Item(None, job.command, None, job.supervisor, job.name, 0, None)
            for job in self.jobs
            if not job.pids
        ]
        return lines

    def _item(self, running: Running) -> Item:
        job = self.job_of(running.pid)
        return Item(
            pid=running.pid,
            command=masked_command(running.argv),
            user=running.user,
            supervisor=job.supervisor if job else None,
            job=job.name if job else None,
            children=len(tree(running.process)) - 1,
            obstacle=obstacle(running, job),
        )


def obstacle(running: Running, job: Job | None = None) -> str | None:
    """Why this process cannot be stopped from here, if so."""
    if running.pid in own_line():
        return "it has started this command: run that from elsewhere"
    if job is None and not may_signal(running.uid):
        users = " or ".join(dict.fromkeys((running.user, "root")))
        return f"belongs to {running.user}: run this as {users}"
    return None


def make_plan(wanted: Wanted) -> Plan:
    """What runs, or would be started again. Changes nothing."""
    found = find(wanted.processes)
    jobs = {
        job.key: job
        for supervisor in dict.fromkeys(supervisors().values())
        for job in supervisor.jobs(wanted, found)
    }
    return Plan(tuple(found), tuple(jobs.values()))
