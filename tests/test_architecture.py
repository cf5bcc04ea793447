"""The rules of the rooms, executable: who may import whom, and who alone may import what."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import helena_cli

PACKAGE = Path(helena_cli.__file__).parent

#: From the top down. A room imports only from rooms below it; those in one line know nothing of
#: each other. What is not named here (__init__, __main__) stands above all.
FLOORS = (
    ("cli", "library"),
    ("proof",),
    ("runtime",),
    ("documents", "database", "host"),
    ("batch",),
    ("config",),
    ("settings",),
    ("errors",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

#: Module → the files that alone may import it.
SOLE_IMPORTERS = {
    "psycopg": "database/",
    "watchdog": "documents/watch",
    "typer": "cli/",
    "rich": "cli/",
}
DRAWERS = {"utils.py", "helpers.py", "types.py", "common.py", "misc.py"}

TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
NODES = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]


def imports() -> Iterator[tuple[str, str]]:
    """Each file of the package with each module that it imports, inside functions too."""
    for name, node in NODES:
        if isinstance(node, ast.Import):
            yield from ((name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are written in full"
            # `from helena_cli import config` imports helena_cli.config.
            yield from ((name, f"{node.module}.{alias.name}") for alias in node.names)


def room(module_or_path: str) -> str:
    return module_or_path.removeprefix("helena_cli.").replace("/", ".").split(".")[0]


def test_every_module_has_a_room():
    assert {room(name.removesuffix(".py")) for name in TREES} <= {*FLOOR, "__init__", "__main__"}


def test_imports_go_down_only():
    up = [
        f"{name} imports {module}"
        for name, module in imports()
        if module.startswith("helena_cli.") and room(name) in FLOOR and room(name) != room(module)
        if FLOOR.get(room(module), -1) <= FLOOR[room(name)]
    ]
    assert up == []


def test_no_module_is_imported_by_what_it_imports():
    """Not even inside of functions; what only the type checker imports does not count."""
    for_types = {
        child
        for _, node in NODES
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    files = {path.removesuffix(".py").replace("/", "."): path for path in TREES}
    graph: dict[str, set[str]] = {path: set() for path in TREES}
    for name, node in NODES:
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            for alias in node.names:
                found = f"{node.module}.{alias.name}".removeprefix("helena_cli.")
                for module in files.keys() & {found, found.rpartition(".")[0]}:
                    graph[name].add(files[module])
    # Raises CycleError, which names them.
    TopologicalSorter(graph).prepare()


def test_each_foreign_package_has_one_door():
    wrong = [
        f"{name} imports {module}"
        for name, module in imports()
        for package, door in SOLE_IMPORTERS.items()
        if module.split(".")[0] == package and not name.startswith(door)
    ]
    assert wrong == []


def test_only_the_configuration_reads_the_environment():
    doors = {"environ", "environb", "getenv", "getenvb", "putenv"}
    readers = {
        name for name, node in NODES if isinstance(node, ast.Attribute) and node.attr in doors
    }
    readers |= {name for name, module in imports() if module in {f"os.{door}" for door in doors}}
    assert readers <= {"config.py"}


def test_only_the_command_line_prints():
    printers = {
        name for name, node in NODES if isinstance(node, ast.Name) and node.id in {"print", "input"}
    }
    assert [name for name in printers if not name.startswith("cli/")] == []


def test_no_function_takes_more_than_six_parameters_but_a_command_its_options():
    long = [
        f"{name}: {node.name}"
        for name, node in NODES
        if isinstance(node, ast.FunctionDef)
        and (name.split("/")[0], node.name) != ("cli", "command")
        and len([*node.args.args, *node.args.kwonlyargs]) > 6 + _is_method(node)
    ]
    assert long == []


def _is_method(node: ast.FunctionDef) -> bool:
    return any(argument.arg in ("self", "cls") for argument in node.args.args[:1])


def test_nothing_is_exempt_from_the_linters():
    mark = re.compile(r"#\s*(noqa|type: ?ignore|mypy:|ruff:)")
    assert [str(path) for path in _sources() if mark.search(path.read_text("utf-8"))] == []


def _sources() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]


def test_there_is_no_drawer():
    assert [name for name in TREES if Path(name).name in DRAWERS] == []
