"""`helena test`: prove that this set-up works, and show what it gains."""

import logging
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from helena_cli.cli import render
from helena_cli.cli.options import PACKAGE_LOG, Common, with_common_options
from helena_cli.errors import ExitCode

if TYPE_CHECKING:
    from helena_cli.proof.promises import Promise
    from helena_cli.proof.proof import Proof

Quick = Annotated[bool, typer.Option("--quick", help="All steps, and a shorter before and after.")]
Ops = Annotated[
    int | None,
    typer.Option("--ops", min=10, metavar="N", help="Operations of the before and after."),
]

#: Operations of the before and after.
USUAL, FEW = 3000, 300

#: Figure → what it is called, and how many digits behind the point it gets.
FIGURES = {
    "operations_per_second": ("operations/s", 0),
    "commits_per_operation": ("commits per operation", 3),
    "wal_bytes_per_operation": ("bytes of WAL per operation", 0),
    "connections_opened": ("connections opened", 0),
    "connections_at_once": ("connections at one time", 0),
    "lock_waits": ("sessions waiting for locks, at most", 0),
    "gin_pending_pages": ("pages in a GIN pending list, at most", 0),
    "longest_query_seconds": ("longest query, s", 2),
    "reader_median_ms": ("a reader's query, median ms", 1),
    "reader_p99_ms": ("a reader's query, 99th percentile ms", 1),
}


@with_common_options
def command(common: Common, quick: Quick = False, ops: Ops = None) -> ExitCode:
    """Prove on this database that Helena keeps its promises, and measure what it gains.

    Everything happens in a schema and a queue of their own, which are removed afterwards. Exits
    with 1 when a promise is not kept.
    """
    from helena_cli.proof.proof import prove
    from helena_cli.runtime import Runtime

    if not PACKAGE_LOG.isEnabledFor(logging.DEBUG):
        # What goes wrong is part of the trial, and told by its steps.
        PACKAGE_LOG.setLevel(logging.CRITICAL)
    with Runtime(common.settings()) as runtime, render.progress("Steps tried") as progress:
        done = count()
        proof = prove(
            runtime,
            operations=ops or (FEW if quick else USUAL),
            tell=lambda name: progress(next(done), None, name),
        )
    if common.json:
        render.print_json(proof.document())
    else:
        _show(proof)
    return ExitCode.DONE if proof.passed else ExitCode.PARTIAL


def _show(proof: "Proof") -> None:
    render.print_table(
        ("", "step", "what was seen"),
        ((_mark(s.passed if s.tried else None), s.name, s.detail) for s in proof.steps),
    )
    if proof.before and proof.after:
        operations = render.many(proof.after.operations, "operation")
        render.print_heading(f"Before and after: {operations}, the same rows")
        render.print_table(
            ("", "connection per operation", "Helena"),
            (
                (
                    name,
                    *(render.number(getattr(f, key), digits) for f in (proof.before, proof.after)),
                )
                for key, (name, digits) in FIGURES.items()
            ),
            right=("connection per operation", "Helena"),
        )
    _print_promises("Guarantees", proof.guarantees)
    _print_promises("Criteria of success", proof.criteria)
    render.print_heading("Everything passed" if proof.passed else "Not everything passed")


def _print_promises(heading: str, promises: "Iterable[Promise]") -> None:
    rows = [(_mark(one.kept), one.name, one.measured, one.limit) for one in promises]
    if rows:
        render.print_heading(heading)
        render.print_table(("", "promise", "measured", "limit"), rows)


def _mark(kept: bool | None) -> object:
    status, text = {True: ("ok", "ok"), False: ("critical", "no"), None: ("unknown", "?")}[kept]
    return render.cell(text, render.STYLES[status])
