"""What a command line runs: the script or module behind the interpreter. Pure text, no machine.

A name that merely stands on the line of an editor, a `grep` or a `sh -c` is not what they run.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct


class Program(Struct, frozen=True):
    """What runs: a script, a module, a text given inline, or a program that is no interpreter."""

    interpreter: str = ""
    script: str = ""
    module: str = ""
    text: str = ""

    def is_called(self, names: Iterable[str]) -> str | None:
        """The first of these names that is the module's, or the script's, its ending aside."""
        own = {_alike(name) for name in self._names()}
        return next((name for name in names if _alike(name) in own), None)

    def _names(self) -> Iterator[str]:
        if self.script:
            folder, _, base = self.script.rstrip("/").rpartition("/")
            yield from (base, _without_ending(base))
            if base == "__main__.py":
                yield folder.rpartition("/")[2]
        if self.module:
            module = self.module.removesuffix(".__main__")
            yield from (module, module.rpartition(".")[2])


def _alike(name: str) -> str:
    # An installed script `morning-brief` starts the module `morning_brief`.
    return name.replace("-", "_")


def _without_ending(base: str) -> str:
    stem, dot, ending = base.rpartition(".")
    return stem if dot and stem and ending.isalnum() and not ending.isdigit() else base


class _Family(Struct, frozen=True):
    """How an interpreter reads its options; each option is a letter, or a long name with dashes."""

    pattern: str
    #: A program text follows, so there is no script.
    inline: frozenset[str] = frozenset()
    #: A value follows, in the same word or in the next.
    valued: frozenset[str] = frozenset()
    #: A module follows.
    module: frozenset[str] = frozenset()
    #: The script itself follows.
    script: frozenset[str] = frozenset()
    #: A first word that is no script.
    verb: str = ""
    #: Whether the rest of a word of letters is the value of the letter that takes one.
    attached: bool = True


_FAMILIES = {
    "python": _Family(
        r"(python|pypy)w?[\d.]*(t|d|dm|-dbg)?",
        inline=frozenset("c"),
        valued=frozenset("WXQ") | {"--check-hash-based-pycs"},
        module=frozenset("m"),
    ),
    "shell": _Family(
        r"(ba|da|a|z|k|mk|fi)?sh",
        inline=frozenset("cs"),
        valued=frozenset("oO") | {"--rcfile", "--init-file"},
        attached=False,
    ),
    "node": _Family(
        r"node|nodejs|tsx|ts-node",
        inline=frozenset("ep") | {"--eval", "--print"},
        valued=frozenset("rC") | {"--require", "--import", "--loader", "--env-file"},
    ),
    "bun": _Family(r"bun|deno", inline=frozenset("e"), verb="run"),
    "ruby": _Family(r"j?ruby[\d.]*", inline=frozenset("e"), valued=frozenset("rIEC")),
    "perl": _Family(r"perl[\d.]*", inline=frozenset("eE"), valued=frozenset("I")),
    "php": _Family(
        r"php[\d.]*", inline=frozenset("rRBES"), valued=frozenset("dcz"), script=frozenset("f")
    ),
}


def program(argv: Sequence[str]) -> Program:
    """What these words run, as the interpreter that is named first reads them."""
    if not argv:
        return Program()
    base = argv[0].rpartition("/")[2].removeprefix("-").removesuffix(".exe")
    for name, family in _FAMILIES.items():
        if re.fullmatch(family.pattern, base, flags=re.IGNORECASE):
            return _interpreted(name, family, list(argv[1:]))
    return Program(script=argv[0].removeprefix("-"))


def _interpreted(name: str, family: _Family, words: list[str]) -> Program:
    """Read the options as the interpreter does, up to the script."""
    while words:
        word = words.pop(0)
        if word == "--":
            return Program(name, script=words[0] if words else "")
        if word in ("-", "+"):
            return Program(name)
        if not word.startswith(("-", "+")):
            if word == family.verb:
                continue
            return Program(name, script=word)
        option, value, takes = _split(family, word)
        if takes and value is None:
            value = words.pop(0) if words else ""
        if option in family.inline:
            return Program(name, text=value or "")
        if option in family.module:
            return Program(name, module=value or "")
        if option in family.script:
            return Program(name, script=value or "")
    return Program(name)


def _split(family: _Family, word: str) -> tuple[str, str | None, bool]:
    """The option of a word that matters, its value if it stands there too, whether it takes one.

    Of a cluster like `-um module` that is the first letter that takes a value.
    """
    special = family.inline | family.valued | family.module | family.script
    if word.startswith("--"):
        option, equals, value = word.partition("=")
        return option, value if equals else None, option in special
    for position, letter in enumerate(word[1:], 2):
        if letter in special:
            return letter, (family.attached and word[position:]) or None, True
    return word, None, False


class _Wrapper(Struct, frozen=True):
    """A program whose arguments are a command: its options with a value, and its own arguments."""

    valued: frozenset[str] = frozenset()
    arguments: int = 0
    verb: str = ""
    module: frozenset[str] = frozenset()
    text: frozenset[str] = frozenset()


_PLAIN = _Wrapper()
_RUNNER = _Wrapper(
    valued=frozenset("pCPE")
    | {"--with", "--python", "--project", "--directory", "--extra", "--group", "--env-file"},
    verb="run",
    module=frozenset({"-m", "--module"}),
)
_WRAPPERS = {
    **dict.fromkeys(("nohup", "setsid", "time", "exec", "command", "chronic", "cronic"), _PLAIN),
    **dict.fromkeys(("unbuffer", "caffeinate", "xvfb-run", "builtin", "eatmydata"), _PLAIN),
    **dict.fromkeys(("uv", "poetry", "pipenv", "pdm", "hatch", "rye", "pixi"), _RUNNER),
    "env": _Wrapper(frozenset("uC")),
    "nice": _Wrapper(frozenset("n")),
    "ionice": _Wrapper(frozenset("cn")),
    "stdbuf": _Wrapper(frozenset("ioe")),
    "timeout": _Wrapper(frozenset("ks"), arguments=1),
    "taskset": _Wrapper(arguments=1),
    "flock": _Wrapper(frozenset("wE"), arguments=1, text=frozenset({"-c", "--command"})),
    "sudo": _Wrapper(frozenset("ughpCrtUT")),
    "doas": _Wrapper(frozenset("uC")),
    "su": _Wrapper(frozenset("sg"), arguments=1, text=frozenset({"-c", "--command"})),
    "runuser": _Wrapper(frozenset("usg"), text=frozenset({"-c", "--command"})),
}

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def programs(argv: Sequence[str]) -> list[Program]:
    """All that a configured command runs, also behind wrappers such as `nice` or `uv run`."""
    words = list(argv)
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    if not words:
        return []
    wrapper = _WRAPPERS.get(words[0].rpartition("/")[2])
    if wrapper is not None:
        return _wrapped(wrapper, words[1:])
    found = program(words)
    inner = shell_programs(found.text) if found.interpreter == "shell" and found.text else []
    return [found, *inner]


def _wrapped(wrapper: _Wrapper, words: list[str]) -> list[Program]:
    arguments = wrapper.arguments
    while words:
        word = words[0]
        if word in wrapper.text:
            return shell_programs(words[1]) if len(words) > 1 else []
        if word in wrapper.module:
            return [Program("python", module=words[1])] if len(words) > 1 else []
        if word.startswith("-"):
            valued = word in wrapper.valued or (len(word) == 2 and word[1] in wrapper.valued)
            del words[: 2 if valued else 1]
        elif _ASSIGNMENT.match(word) or word == wrapper.verb:
            words.pop(0)
        elif arguments:
            # What follows may still be an option: flock /lock -c 'command'.
            arguments -= 1
            words.pop(0)
        else:
            return programs(words)
    return []


_KEYWORDS = frozenset({"if", "then", "else", "elif", "do", "while", "until", "!", "{", "time"})
_SEPARATOR = re.compile(r"[();|&\n]+")


def shell_programs(text: str) -> list[Program]:
    """All that a line of shell runs, command by command."""
    return [one for words in _commands(text) for one in programs(words)]


def _commands(text: str) -> Iterator[list[str]]:
    words: list[str] = []
    skip = False
    for token in _tokens(text):
        if _SEPARATOR.fullmatch(token):
            yield words
            words = []
        elif set(token) <= set("<>&|"):
            skip = True  # the file of a redirection, which follows; its number came before
            words = words[:-1] if words and words[-1].isdigit() else words
        elif skip:
            skip = False
        elif words or token not in _KEYWORDS:
            words.append(token)
    yield words


def _tokens(text: str) -> list[str]:
    reader = shlex.shlex(text.replace("\n", " ; "), posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    reader.commenters = ""
    try:
        return list(reader)
    except ValueError:  # a quote that is never closed
        return text.split()


def run_by(found: Iterable[Program], names: Sequence[str]) -> str | None:
    """The first of these names that one of the programs is called."""
    return next((name for one in found if (name := one.is_called(names))), None)
