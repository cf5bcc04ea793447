"""Programs of the machine that Helena asks: systemctl, launchctl and their like.

Always a list of arguments, never a shell; without a terminal, so that none of them can ask.
"""

import logging
import subprocess
from collections.abc import Sequence

from msgspec import Struct

logger = logging.getLogger(__name__)

#: What a shell says of a program that is not there, of one that cannot be run, and what timeout(1)
#: says of one that had to be killed. An answer, not an error: whoever asks may go on without.
MISSING = 127
FORBIDDEN = 126
TIMED_OUT = 124


class Finished(Struct, frozen=True):
    """How a program ended. A negative code is the signal that killed it."""

    code: int
    output: str
    error: str


def run(argv: Sequence[str], *, timeout: float = 10.0, stdin: str = "") -> Finished:
    """Run a program to its end, or kill it after `timeout` seconds; it reads `stdin`. Never raises.

    MISSING, FORBIDDEN and TIMED_OUT stand for a program that did not come to an end of its own;
    `error` then says so.
    """
    try:
        process = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            # What it prints need not be text in our encoding.
            encoding="utf-8",
            errors="replace",
            # No terminal: polkit would ask for a password there, and Ctrl-C is ours to handle.
            start_new_session=True,
        )
        finished = Finished(process.returncode, process.stdout, process.stderr)
    except subprocess.TimeoutExpired:
        finished = Finished(TIMED_OUT, "", f"{argv[0]} gave no answer within {timeout:g} s")
    except FileNotFoundError:
        finished = Finished(MISSING, "", f"{argv[0]} is not installed")
    except OSError as error:
        finished = Finished(FORBIDDEN, "", f"{argv[0]} cannot be run: {error.strerror}")
    logger.debug("%s ended with %d", " ".join(argv), finished.code)
    return finished
