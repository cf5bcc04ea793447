"""`helena enqueue`: for programs in other languages, which write JSON lines to its stdin."""

import sys
from io import BufferedReader
from typing import TYPE_CHECKING, Annotated, cast

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode, SpoolError, UsageError

if TYPE_CHECKING:
    from helena_cli.batch.intake import Rejection
    from helena_cli.runtime import Runtime

Kind = Annotated[str, typer.Argument(metavar="KIND", help="insert, update or message.")]
Table = Annotated[str, typer.Argument(metavar="TABLE", help="A table's name, or schema.name.")]

#: Rejected lines that are told one by one on stderr, and that are kept for --json.
TOLD = 20
KEPT = 10_000

#: Bytes that are read at once; of a pipe, what has come so far.
BLOCK = 256 * 1024


@with_common_options
def command(common: Common, kind: Kind, table: Table) -> ExitCode:
    """Queue operations read from standard input: one JSON object of column to value on each line.

    A line that cannot be queued is reported, and the others are queued all the same. The flusher of
    this host writes them; when none runs, this command does before it ends.
    """
    from helena_cli.batch.intake import Lines
    from helena_cli.runtime import Runtime

    stream = _stdin()
    settings = common.settings()
    rejections = _Rejections()
    error: SpoolError | None = None
    with Runtime(settings) as runtime:
        lines = Lines(
            runtime.engine,
            kind,
            table,
            max_bytes=settings.batch.max_operation_bytes,
            reject=rejections.add,
        )
        try:
            while block := stream.read1(BLOCK):
                lines.feed(block)
            lines.end()
        except SpoolError as caught:
            error = caught
    rejections.say_rest()
    _show(lines.accepted, rejections, as_json=common.json)
    if error is not None:
        raise error
    _say_who_writes(runtime, lines.accepted)
    return ExitCode.PARTIAL if rejections.count else ExitCode.DONE


def _stdin() -> BufferedReader:
    """The stream of bytes. Raises UsageError when there is none."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "helena enqueue reads JSON lines from its standard input; nothing is piped into it.",
            remedy="Pipe them in: PROGRAM | helena enqueue message messages; or use < FILE.",
        )
    # Never a text stream without bytes below: nothing has replaced the one of the process.
    return cast(BufferedReader, sys.stdin.buffer)


class _Rejections:
    """Tells of rejected lines as they come, of the first ones in full."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[Rejection] = []

    def add(self, rejection: "Rejection") -> None:
        self.count += 1
        if self.count <= TOLD:
            render.say(f"line {rejection.line}: {render.plain(rejection.reason)}")
        if self.count <= KEPT:
            self.kept.append(rejection)

    def say_rest(self) -> None:
        if self.count > TOLD:
            render.say(f"and {render.many(self.count - TOLD, 'more line')} rejected.")


def _show(accepted: int, rejections: _Rejections, *, as_json: bool) -> None:
    if as_json:
        from msgspec import to_builtins

        rejected = to_builtins(rejections.kept)
        render.print_json(
            {"accepted": accepted, "rejected": rejected, "rejected_total": rejections.count}
        )
        return
    rejected = f", {render.many(rejections.count, 'line')} rejected" if rejections.count else ""
    print(f"{render.many(accepted, 'operation')} accepted{rejected}.")


def _say_who_writes(runtime: "Runtime", accepted: int) -> None:
    if runtime.dead:
        refused = render.many(runtime.dead, "operation")
        render.say(f"The database refused {refused}. Why: helena dead-letters list")
    if runtime.flusher_running():
        if accepted:
            render.say("The running flusher writes what is queued.")
    elif runtime.remaining:
        waiting = render.many(runtime.remaining, "operation")
        render.say(
            f"Still queued: {waiting}, in {runtime.state_dir}. The next helena process-pending, or"
            " any program that uses Helena, writes it."
        )
