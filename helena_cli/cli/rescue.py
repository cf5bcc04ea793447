"""One run of `helena clear-locks`: look, show, ask, act, look again, clean, and keep a record."""

from typing import TYPE_CHECKING, Any

from helena_cli.cli import render
from helena_cli.errors import DatabaseRefused, DatabaseUnreachable, HelenaError, Refused

if TYPE_CHECKING:
    from helena_cli.database.cleaning import Cleaning
    from helena_cli.database.clearing import Done
    from helena_cli.database.locks import Server
    from helena_cli.database.relief import Plan, Scope
    from helena_cli.runtime import Runtime

#: A chain may be this long: each one who was freed may hold up the next.
ROUNDS = 5

#: In the state directory: what was ended, when and by whom, one JSON document to a line.
JOURNAL = "clear-locks.log"


class Rescue:
    """The run, and what it knows so far."""

    def __init__(
        self, runtime: "Runtime", server: "Server", scope: "Scope", *, show: bool, vacuum: bool
    ) -> None:
        from helena_cli.database.locks import lasting_look
        from helena_cli.database.relief import make_plan

        self._runtime = runtime
        self._server = server
        self._scope = scope
        self._show = show
        self._vacuum = vacuum
        look = lasting_look(server)
        self._advisory = look.advisory(scope.pids)
        self._plans: list[Plan] = [make_plan(look, scope)]
        self._relations = self._plans[0].relations | (scope.relations or frozenset())
        self._done: list[Done] = []
        self._cleaning: Cleaning | None = None
        self.remaining = self._left(self._plans[0])

    def work(self, *, dry_run: bool, yes: bool, may_ask: bool) -> HelenaError | None:
        """Show, ask, do and look again. The error that stopped it is returned, to be raised last.

        What was done until then is to be shown in any case.
        """
        plan = self._plans[0]
        if self._show:
            self._print_plan(plan)
        if dry_run:
            return None
        try:
            if plan.actions or self._to_clean():
                _ask(plan, yes=yes, may_ask=may_ask)
            if plan.actions:
                self._free(yes=yes)
            self._clean()
        except (Refused, DatabaseRefused, DatabaseUnreachable) as error:
            return error
        return None

    @property
    def done_in_part(self) -> bool:
        """Whether something still blocks, or what was named could not be ended or cleaned."""
        cleaning = self._cleaning
        return self.remaining > 0 or (
            bool(self._scope.relations)
            and cleaning is not None
            and (bool(cleaning.skipped) or not all(one.succeeded for one in cleaning.tables))
        )

    def document(self) -> dict[str, Any]:
        """The contract with other programs."""
        from msgspec import to_builtins

        from helena_cli.cli import relief_report as report

        cleaning = to_builtins(self._cleaning) if self._cleaning else {}
        first = self._plans[0]
        return {
            "database": self._server.label,
            "detour": self._server.detour,
            "blocked": report.blocked_document(first),
            "plan": [report.action_document(a) for plan in self._plans for a in plan.actions],
            "left_alone": [report.spared_document(one) for one in self._plans[-1].spared],
            "applied": [report.done_document(one) for one in self._done],
            "gin": cleaning.get("gin", []),
            "tables": cleaning.get("tables", []),
            "not_cleaned": cleaning.get("skipped"),
            "remaining": self.remaining,
        }

    def _free(self, *, yes: bool) -> None:
        """Do what is planned, and what turns out to be left, until nothing blocks any more."""
        from helena_cli.database import clearing
        from helena_cli.database.relief import follow_up, make_plan

        for round_ in range(ROUNDS):
            plan = self._plans[-1]
            if not plan.actions:
                break
            if round_:
                if self._show:
                    self._print_plan(plan)
                try:
                    _ask(plan, yes=yes, may_ask=self._show)
                except Refused:
                    # No more than that: a part is done.
                    break
            done = clearing.apply(self._server, plan.actions)
            self._done.extend(done)
            self._note(done)
            if self._show:
                from helena_cli.cli.relief_report import print_done

                print_done(done)
            now = make_plan(clearing.settled(self._server, plan), self._scope)
            self.remaining = self._left(now)
            cancelled = {one.action.session.key for one in self._done if one.cancelled}
            acted = [one.action for one in self._done]
            self._plans.append(follow_up(now, acted, cancelled))
            self._relations |= self._plans[-1].relations
            if not any(one.succeeded for one in done):
                break
        # Those that block nobody are not counted yet.
        last = {one.action.session.key: one for one in self._done}
        self.remaining += sum(not (d.succeeded or d.action.frees) for d in last.values())
        if self._show:
            self._print_end()

    def _left(self, plan: "Plan") -> int:
        """How many wait for a lock, and how many others were named and are left alone.

        Not whom they wait for, and not those that idle because their query was cancelled.
        """
        known = {key for blockers in plan.edges.values() for key in blockers}.union(plan.edges)
        done = {one.action.session.key for one in self._done if one.succeeded}
        alone = {one.session.key for one in plan.spared} & plan.look.sessions.keys() - known - done
        return plan.blocked + len(alone & self._scope.pids)

    def _print_plan(self, plan: "Plan") -> None:
        from helena_cli.cli.relief_report import print_plan, print_server

        first = plan is self._plans[0]
        if first:
            print_server(self._server)
        print_plan(plan, self._names() if first else (), advisory=self._advisory if first else 0)

    def _print_end(self) -> None:
        from helena_cli.cli.relief_report import print_spared

        blocked = self._plans[-1].blocked
        if not blocked:
            if self._plans[0].blocked:
                print("\nNothing is blocked any more.")
            return
        render.print_heading(f"{render.many(blocked, 'session')} still blocked by:")
        print_spared(self._plans[-1].spared)

    def _to_clean(self) -> bool:
        return self._vacuum and bool(self._relations) and self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why nothing can be cleaned on this connection."""
        if self._server.standby:
            return "this server is a standby"
        if self._server.pooled:
            return (
                "there is a pooler before the database, and VACUUM needs a way past it: "
                "set [database] direct_dsn"
            )
        return None

    def _names(self) -> list[str]:
        from helena_cli.database.cleaning import names

        if not self._to_clean() or self._server.detour:
            return []
        return names(self._server.connection, self._relations)

    def _clean(self) -> None:
        from helena_cli.cli.relief_report import print_cleaning
        from helena_cli.database import cleaning, connection

        if not (self._vacuum and self._relations):
            return
        obstacle = self._obstacle()
        if obstacle:
            self._cleaning = cleaning.Cleaning(skipped=obstacle)
        else:
            with render.progress("Cleaning") as progress:
                if self._server.detour:
                    target = self._runtime.direct_target()
                    with connection.connect(target, application="clear-locks") as way_in:
                        self._cleaning = cleaning.clean(way_in, self._relations, progress)
                else:
                    self._cleaning = cleaning.clean(
                        self._server.connection, self._relations, progress
                    )
        if self._show:
            print_cleaning(self._cleaning)

    def _note(self, done: "list[Done]") -> None:
        """Keep what was ended, with its query."""
        from helena_cli.cli.relief_report import action_document
        from helena_cli.host import journal

        about = {"database": self._server.label}
        events = [about | action_document(one.action) | {"result": one.result} for one in done]
        try:
            journal.note(self._runtime.state_dir / JOURNAL, events)
        except (OSError, HelenaError) as error:
            # The database comes first.
            render.say(f"what was done could not be noted in {JOURNAL}: {error}")


def _ask(plan: "Plan", *, yes: bool, may_ask: bool) -> None:
    if yes:
        return
    sessions = render.many(len(plan.actions), "session")
    question = f"End {sessions} as planned?" if plan.actions else "Clean the tables as planned?"
    if not may_ask:
        raise Refused(question, remedy="Nothing was changed. To do it: the same with --yes.")
    render.confirm(question, yes=False)
