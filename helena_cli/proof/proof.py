"""The whole proof: the steps, the guarantees, and the comparison of before and after."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from msgspec import Struct, to_builtins

from helena_cli.errors import HelenaError
from helena_cli.proof import promises, race
from helena_cli.proof.promises import Lone, Promise
from helena_cli.proof.race import Figures
from helena_cli.proof.step import Step, told
from helena_cli.proof.steps import Steps
from helena_cli.proof.trial import Trial
from helena_cli.runtime import Runtime

#: Called with what comes next.
Tell = Callable[[str], None]


class Proof(Struct, frozen=True):
    """What was tried and measured. Without `after` it did not come to the comparison."""

    steps: tuple[Step, ...]
    before: Figures | None = None
    after: Figures | None = None
    guarantees: tuple[Promise, ...] = ()
    criteria: tuple[Promise, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every step and every promise that could be measured was kept."""
        kept = all(promise.kept is not False for promise in (*self.guarantees, *self.criteria))
        return all(step.passed for step in self.steps) and self.after is not None and kept

    def document(self) -> dict[str, Any]:
        """The contract with other programs: keys may be added, never renamed."""
        return {
            "passed": self.passed,
            "steps": to_builtins(self.steps),
            "before": to_builtins(self.before) if self.before else {},
            "after": to_builtins(self.after) if self.after else {},
            "guarantees": to_builtins(self.guarantees),
            "criteria": to_builtins(self.criteria),
        }


def prove(runtime: Runtime, *, operations: int, tell: Tell) -> Proof:
    """Try all steps, then write so many operations both ways.

    Leaves neither schema nor queue behind. Raises DatabaseUnreachable when there is no database.
    """
    runtime.connect("test").close()
    with Trial(runtime) as trial, ExitStack() as stack:
        steps: list[Step] = []
        lone: Lone | None = None
        for step in Steps(trial).run(tell):
            steps.append(step)
            if step.name == "scratch schema" and step.passed:
                # It takes its time, so it starts early.
                lone = stack.enter_context(Lone(trial))
        if lone is None:
            return Proof(tuple(steps))
        try:
            return _compare(trial, tuple(steps), lone, operations, tell)
        except HelenaError as error:
            failed = Step("before and after", False, told(error))
            return Proof((*steps, failed))


def _compare(
    trial: Trial, steps: tuple[Step, ...], lone: Lone, operations: int, tell: Tell
) -> Proof:
    tell("written within the interval")
    # Before anything is measured, so that nothing else goes on then.
    waited = lone.wait()
    rows = race.make_rows(operations)
    tell("before: a connection per operation")
    before = race.before(trial, rows)
    tell("after: through Helena")
    after = race.after(trial, rows)
    tell("memory and response time")
    grown = promises.memory(trial)
    answer = promises.response_ms(trial)
    return Proof(
        steps,
        before,
        after,
        tuple(promises.guarantees(waited, lone.interval, grown, after, steps)),
        tuple(promises.criteria(after, answer, trial.checks)),
    )
