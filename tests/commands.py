"""Runs `helena` in a folder of its own, with nothing but what is given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helena_cli

PROJECT = Path(helena_cli.__file__).parent.parent

Result = subprocess.CompletedProcess[bytes]


class Program:
    """The program, for one database and one state directory, run in `folder`."""

    def __init__(self, folder: Path, state_dir: Path, dsn: str) -> None:
        self.folder = folder
        self.variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(PROJECT),
            "PYTHONWARNINGS": "error",
            "HELENA_STATE_DIR": str(state_dir),
            "HELENA_DSN": dsn,
        }

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start it; its stdin, stdout and stderr are pipes."""
        return subprocess.Popen(
            [sys.executable, "-m", "helena_cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env=self.variables | variables,
        )

    def run(self, *arguments: str, stdin: bytes = b"", **variables: str) -> Result:
        """Run it to its end."""
        with self.start(*arguments, **variables) as process:
            output, errors = process.communicate(stdin, timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def json(self, *arguments: str, code: int = 0, stdin: bytes = b"", **variables: str) -> Any:
        """The document that it prints with --json."""
        result = self.run(*arguments, "--json", stdin=stdin, **variables)
        assert result.returncode == code, result.stderr.decode()
        return json.loads(result.stdout)
