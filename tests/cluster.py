"""A PostgreSQL cluster of the tests' own, in a private folder, from any set of binaries."""

import atexit
import functools
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psycopg.conninfo import make_conninfo

from helena_cli.database.embedded import reachable
from tests.ports import free_port

#: Nothing here survives a power cut, and need not: the folder is deleted afterwards.
SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "autovacuum": "off",
    "jit": "off",
    "max_connections": "60",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


#: Bytes that all clusters at one time need, at most.
ROOM = 4 * 1024**3


class Cluster:
    """Made on the first start, deleted by `close`. Reached by a Unix socket, and by TCP when asked.

    The socket asks for no password: the folder is private. TCP (loopback only) asks for
    `password`. As root the server runs as an ordinary user of the machine.
    """

    def __init__(
        self, binaries: Path, *, tcp: bool = False, settings: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="helena-", dir=_place()))
        self.account = _server_user()
        if self.account:
            os.chown(self.folder, self.account["user"], self.account["group"])
        self._mould = _mould(binaries)
        self.binaries = self._mould.binaries
        self.password = self._mould.password
        self.port = free_port() if tcp else 5432
        self.settings = {**SETTINGS, "listen_addresses": "127.0.0.1" if tcp else ""}
        self.settings |= {"port": str(self.port), **(settings or {})}
        self.dsn = make_conninfo(
            host=str(self.folder), port=self.port, user="postgres", dbname="postgres"
        )
        self.tcp_dsn = make_conninfo(
            self.dsn, host="127.0.0.1", password=self.password, sslmode="prefer"
        )

    def start(self) -> None:
        """Start the server and wait until it answers, also after a crash."""
        if not (self.folder / "data").exists():
            self._create()
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-t", "60", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `smart`, `fast` or `immediate` (like a crash)."""
        self._run("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def running(self) -> bool:
        """Whether the server process is there."""
        status = ["-D", "data", "status"]
        return self._call("pg_ctl", *status).returncode == 0

    def close(self) -> None:
        """Stop it if need be, and delete everything."""
        if (self.folder / "data").exists() and self.running():
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def write(self, name: str, text: str) -> Path:
        """Write a file of the data folder (pg_hba.conf, a certificate) as the server's user."""
        path = self.folder / "data" / name
        path.write_text(text)
        path.chmod(0o600)
        if self.account:
            os.chown(path, self.account["user"], self.account["group"])
        return path

    def _create(self) -> None:
        # With its owner.
        subprocess.run(["cp", "-Rp", self._mould.data, self.folder / "data"], check=True)
        with (self.folder / "data" / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in self.settings.items())
            conf.write(f"unix_socket_directories = '{self.folder}'\n")

    def _run(self, program: str, *arguments: str) -> None:
        result = self._call(program, *arguments)
        if result.returncode != 0:
            log = self.folder / "log"
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise RuntimeError(f"{program} {' '.join(arguments)}:\n{result.stderr}\n{tail}")

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _call(self.folder, self.account, self.binaries / program, *arguments)


def _place() -> str:
    """Where clusters lie: in memory, where there is plenty of it.

    Not in tmp_path: a socket's path may have about 100 characters.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free >= ROOM
    return str(memory) if roomy and os.access(memory, os.W_OK) else "/tmp"


class _Mould:
    """What all clusters of the same programs begin with: `initdb` takes longer than a copy."""

    def __init__(self, binaries: Path) -> None:
        folder = Path(tempfile.mkdtemp(prefix="helena-", dir="/tmp"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        account = _server_user()
        if account:
            os.chown(folder, account["user"], account["group"])
        self.binaries = reachable(binaries, folder, account) if account else binaries
        self.password = secrets.token_hex(8)
        self.data = folder / "data"
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        if account:
            os.chown(password, account["user"], account["group"])
        encoding = ["--encoding=UTF8", "--locale=C"]
        auth = ["--auth-local=trust", "--auth-host=scram-sha-256", "--pwfile=password"]
        command = ["-D", "data", "-U", "postgres", "--no-sync", *encoding, *auth]
        result = _call(folder, account, self.binaries / "initdb", *command)
        if result.returncode != 0:
            raise RuntimeError(f"initdb: {result.stderr}")


@functools.cache
def _mould(binaries: Path) -> _Mould:
    return _Mould(binaries)


def _call(
    folder: Path, account: Mapping[str, Any], program: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the server's programs in a folder, as its user."""
    # Files, not pipes: the server inherits them and would keep a pipe open for ever.
    with tempfile.TemporaryFile("w+") as output:
        command: Sequence[str] = [str(program), *arguments]
        result = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            timeout=120,
            **account,
        )
        output.seek(0)
        return subprocess.CompletedProcess(command, result.returncode, "", output.read())


def _server_user() -> dict[str, Any]:
    """The arguments that make a subprocess run as a user PostgreSQL accepts: it refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("There is no user to run PostgreSQL as: neither postgres nor nobody.")
