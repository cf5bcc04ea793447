"""How the plan and the result of `helena clear-locks` look, for a person and for a program."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from helena_cli.cli import render
from helena_cli.cli.blocking_tree import print_tree, state, who

if TYPE_CHECKING:
    from helena_cli.database.blocking import Session
    from helena_cli.database.cleaning import Cleaning
    from helena_cli.database.clearing import Done
    from helena_cli.database.locks import Server
    from helena_cli.database.relief import Action, Plan, Spared


def print_server(server: "Server") -> None:
    """Which database this is about, and how it was reached."""
    render.print_facts([("Database", server.label)])
    if server.detour:
        render.say(f"{server.detour.rstrip('.')}. So it is looked at from another database.")


def print_plan(plan: "Plan", tables: Sequence[str], *, advisory: int) -> None:
    """The tree, what is to be done about it, and what is left alone."""
    if plan.blocked:
        blocked = render.many(plan.blocked, "session")
        render.print_heading(f"Who waits for whom ({blocked} blocked)")
        print_tree(plan)
    else:
        print("Nothing is blocked.")
    if advisory:
        render.say(
            f"{render.many(advisory, 'session')} waiting for advisory locks are not counted: "
            "programs hold these on purpose. To end a holder: --pid."
        )
    if plan.actions or tables:
        render.print_heading("Plan")
        facts: list[tuple[str, object]] = []
        for action in plan.actions:
            facts.extend(_facts(_called(action.deed, action.session), action))
        if tables:
            facts.append(("then clean", f"{', '.join(tables)}: GIN lists, VACUUM (ANALYZE)"))
        render.print_facts(facts)
    if plan.spared:
        render.print_heading("Left alone")
        print_spared(plan.spared)


def print_spared(spared: "Iterable[Spared]") -> None:
    """Who is left alone, why, and what a person can do."""
    facts: list[tuple[str, object]] = []
    for one in spared:
        owner = f"; {_who(one.session)}" if one.session.user else ""
        facts.append((_called("", one.session), f"{one.reason}{owner}"))
        if one.session.query:
            facts.append(("", one.session.query))
        facts.append(("", f"What to do: {one.remedy}"))
    render.print_facts(facts)


def print_done(done: "Iterable[Done]") -> None:
    """What became of each action."""
    render.print_heading("Done")
    styles = {True: "ok", False: "critical"}
    render.print_facts(
        (
            _called(one.action.deed, one.action.session),
            render.cell(one.result, render.STYLES[styles[one.succeeded]]),
        )
        for one in done
    )


def print_cleaning(cleaning: "Cleaning") -> None:
    """Pending lists and tables, before and after."""
    if cleaning.gin or cleaning.tables:
        render.print_heading("Cleaned")
    if cleaning.gin:
        render.print_table(
            ("GIN index", "pending tuples", "after", "pages", "after", "result"),
            (
                (
                    one.index,
                    _known(one.tuples_before),
                    _known(one.tuples_after),
                    _known(one.pages_before),
                    _known(one.pages_after),
                    one.result,
                )
                for one in cleaning.gin
            ),
            right=("pending tuples", "after", "pages"),
        )
    if any(one.pages_before is None for one in cleaning.gin):
        render.say("To look into a pending list takes the extension pgstattuple and pg_monitor.")
    if cleaning.tables:
        render.print_table(
            ("table", "dead rows", "after", "result"),
            (
                (
                    one.table,
                    f"{one.dead_before:,}",
                    f"{one.dead_after:,}",
                    f"{one.result}, {render.duration(one.seconds)}",
                )
                for one in cleaning.tables
            ),
            right=("dead rows", "after"),
        )
    remedies = [*(one.remedy for one in cleaning.gin), *(one.remedy for one in cleaning.tables)]
    for remedy in dict.fromkeys(filter(None, remedies)):
        render.say(f"  what to do: {remedy}")
    if cleaning.skipped:
        render.say(f"Not cleaned: {cleaning.skipped}.")


def _called(deed: str, session: "Session") -> str:
    return f"{deed} {session.name}".strip()


def _facts(title: str, action: "Action") -> "Iterable[tuple[str, object]]":
    frees = render.many(action.frees, "session")
    yield title, f"frees {frees}: {action.reason}" if action.frees else action.reason
    yield "", _who(action.session)
    if action.session.query:
        yield "", action.session.query


def _who(session: "Session") -> str:
    place = f" from {session.client}" if session.client else ""
    return f"{who(session)}{place}, {state(session)}"


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


# For programs: keys may be added, never renamed.


def action_document(action: "Action") -> dict[str, Any]:
    """An action that is planned."""
    return {
        **session_document(action.session),
        "action": action.deed,
        "reason": action.reason,
        "frees": action.frees,
    }


def done_document(one: "Done") -> dict[str, Any]:
    """An action that was done."""
    return {
        "pid": one.action.session.pid,
        "gid": one.action.session.gid,
        "action": one.action.deed,
        "result": one.result,
        "succeeded": one.succeeded,
    }


def spared_document(one: "Spared") -> dict[str, Any]:
    """A session that is left alone."""
    return {**session_document(one.session), "reason": one.reason, "remedy": one.remedy}


def blocked_document(plan: "Plan") -> list[dict[str, Any]]:
    """Who waits, for what and for whom."""
    sessions = ((plan.look.sessions[key], blockers) for key, blockers in plan.edges.items())
    return [
        {
            **session_document(session),
            "waits_for": str(session.awaits) if session.awaits else None,
            "waited": session.waited,
            "blocked_by": sorted(blockers, key=str),
        }
        for session, blockers in sessions
    ]


def session_document(session: "Session") -> dict[str, Any]:
    """Who it is, and what it does."""
    return {
        "pid": session.pid,
        "gid": session.gid,
        "user": session.user,
        "application": session.application,
        "client": session.client,
        "state": session.state,
        "seconds": session.seconds,
        "query": session.query,
    }
