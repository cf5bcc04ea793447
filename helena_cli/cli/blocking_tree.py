"""The tree of who waits for whom, on the terminal."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from helena_cli.cli import render

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from helena_cli.database.blocking import Key, Session
    from helena_cli.database.relief import Plan

#: Characters of a query; the plan has all of it for those who are to be ended.
QUERY = 120

#: The longer end of a chain is shown side by side: each branch is narrower by four columns.
DEEPEST = 6


def print_tree(plan: "Plan") -> None:
    """Each who blocks others, and those who wait below the last one they wait for."""
    from helena_cli.database.blocking import roots

    branches = _Branches(plan)
    for root in roots(plan.edges):
        render.show(branches.tree(root))
    circle = sorted(map(str, plan.edges.keys() - branches.shown))
    if circle:
        render.say(
            f"These wait for each other: {', '.join(circle)}. PostgreSQL ends a deadlock by itself."
        )


class _Branches:
    def __init__(self, plan: "Plan") -> None:
        from helena_cli.database.blocking import depths

        self._plan = plan
        self._marks = {action.session.key: action.deed for action in plan.actions}
        depth = depths(plan.edges)
        #: The one that it waits for longest.
        self._parents: dict[Key, Key] = {
            key: max(blockers, key=lambda one: (depth[one], str(one)))
            for key, blockers in plan.edges.items()
            if key in depth
        }
        self._children: dict[Key, list[Key]] = {}
        for key, parent in self._parents.items():
            self._children.setdefault(parent, []).append(key)
        self.shown: set[Key] = set()

    def tree(self, root: "Key") -> "Tree":
        from rich.tree import Tree

        tree = Tree(self._line(self._plan.look.sessions[root]), guide_style="dim")
        # Not recursive: a queue may be longer than Python's stack.
        growing = deque([(tree, root, 0)])
        while growing:
            branch, key, depth = growing.popleft()
            for inner, twig in self._grow(branch, key):
                growing.append((twig if depth < DEEPEST else branch, inner, depth + 1))
        return tree

    def _grow(self, branch: "Tree", parent: "Key") -> "Iterator[tuple[Key, Tree]]":
        """Add those that wait for the parent, and tell of which of them others wait for."""
        keys = sorted(self._children.get(parent, ()), key=str)
        self.shown.update(keys)
        leaves: list[Session] = []
        for session in (self._plan.look.sessions[key] for key in keys):
            if session.key in self._children or session.key in self._marks:
                yield session.key, branch.add(self._line(session))
            else:
                leaves.append(session)
        for group in _alike(leaves):
            branch.add(self._line(group[0]) if len(group) == 1 else _crowd(group))

    def _line(self, session: "Session") -> "Text":
        text = render.cell(f"{session.name} {who(session)}, {state(session)}")
        mark = self._marks.get(session.key)
        if mark:
            text.append(f"  ← {mark}", style=render.STYLES["warn"])
        elsewhere = self._elsewhere(session)
        if elsewhere:
            text.append(f" (and waits for {', '.join(map(str, elsewhere))})")
        return _with_query(text, session)

    def _elsewhere(self, session: "Session") -> "list[Key]":
        """Whom else it waits for, besides those that stand above it here."""
        above: list[Key] = [session.key]
        while above[-1] in self._parents:
            above.append(self._parents[above[-1]])
        return sorted(self._plan.edges.get(session.key, frozenset()) - set(above), key=str)


def who(session: "Session") -> str:
    """`alice (psql)`."""
    program = f" ({session.application})" if session.application else ""
    return f"{session.user or '?'}{program}"


def state(session: "Session") -> str:
    """What it does, and for how long."""
    if session.awaits is not None:
        return f"waits {render.duration(session.waited)} for {session.awaits}"
    if session.state is None:
        return "in a state that this role may not see"
    return f"{session.state} for {render.duration(session.seconds)}"


def _alike(sessions: "Iterable[Session]") -> "Iterator[list[Session]]":
    """Those with the same query that wait for the same."""

    def what(session: "Session") -> tuple[str, str]:
        return str(session.awaits), _short(session.query)

    for _, group in groupby(sorted(sessions, key=what), key=what):
        yield list(group)


def _crowd(sessions: "list[Session]") -> "Text":
    longest = max(session.waited or 0.0 for session in sessions)
    pids = ", ".join(str(session.key) for session in sessions)
    text = render.cell(
        f"{len(sessions)} sessions wait up to {render.duration(longest)} "
        f"for {sessions[0].awaits}: {pids}"
    )
    return _with_query(text, sessions[0])


def _with_query(text: "Text", session: "Session") -> "Text":
    if session.query:
        text.append("\n").append_text(render.cell(_short(session.query), "dim"))
    return text


def _short(query: str) -> str:
    text = " ".join(render.plain(query).split())
    return text if len(text) <= QUERY else f"{text[: QUERY - 1]}…"
