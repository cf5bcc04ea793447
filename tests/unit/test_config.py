"""Where a setting comes from, which one wins, and what is refused."""

import os
from pathlib import Path

import pytest

from helena_cli.config import file_to_write, has_password, load
from helena_cli.errors import ConfigurationError, UsageError
from helena_cli.settings import PendingSettings, Settings


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str, name: str = "helena.toml") -> Path:
    path = Path(name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(text: str = "", **environ: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        load(file=written(text), environ=environ)
    return caught.value


def test_without_any_source_every_value_is_the_default():
    settings = load(environ={})
    here = Path.cwd()
    folders = PendingSettings(
        operations=f"{here}/helena_batch_pending",
        tasks=f"{here}/helena_tasks",
        backlog=f"{here}/sql/realtime_updates",
    )
    assert settings == Settings(state_dir=settings.state_dir, pending=folders)
    assert settings.origin("batch.size") == "the default"


def test_a_value_remembers_where_it_came_from():
    path = written("[batch]\nsize = 7\ninterval = 2\nmax_size = 9\n")
    settings = load(environ={"HELENA_BATCH_INTERVAL": "3"}, options={"batch": {"max_size": 10}})
    assert (settings.batch.size, settings.batch.interval, settings.batch.max_size) == (7, 3.0, 10)
    assert settings.origin("batch.size") == str(path)
    assert settings.origin("batch.interval") == "HELENA_BATCH_INTERVAL"
    assert settings.origin("batch.max_size") == "--max-size"


def test_an_option_that_was_not_given_overrides_nothing():
    written('[database]\ndsn = "host=a"\n')
    assert load(environ={}, options={"database": {"dsn": None}}).database.dsn == "host=a"


# Which file


def test_the_named_file_wins_over_the_variable_and_the_folder():
    written("[batch]\nsize = 1\n")
    second, third = (
        written("[batch]\nsize = 2\n", "b.toml"),
        written("[batch]\nsize = 3\n", "c.toml"),
    )
    environ = {"HELENA_CONFIG": str(second)}
    assert load(file=third, environ=environ).batch.size == 3
    assert load(environ=environ).batch.size == 2
    assert load(environ={}).batch.size == 1


def test_the_users_own_file_is_the_last_resort(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("config").absolute()))
    path = written("[batch]\nsize = 4\n", "config/helena/helena.toml")
    settings = load(environ={})
    assert settings.batch.size == 4
    assert settings.config_file == path


def test_a_named_file_that_is_missing_is_refused_with_its_path():
    with pytest.raises(ConfigurationError, match=r"/nowhere/helena\.toml.*No such file"):
        load(file=Path("/nowhere/helena.toml"), environ={})
    with pytest.raises(ConfigurationError, match=r"/nowhere/helena\.toml.*No such file"):
        load(environ={"HELENA_CONFIG": "/nowhere/helena.toml"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused():
    written("").chmod(0)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        load(environ={})


def test_a_new_file_goes_where_the_next_command_finds_it():
    assert file_to_write(None, {}) == Path("helena.toml").absolute()
    assert file_to_write(None, {"HELENA_CONFIG": "/etc/h.toml"}) == Path("/etc/h.toml")
    assert file_to_write(Path("x.toml"), {"HELENA_CONFIG": "/h"}) == Path("x.toml").absolute()


# What a file may hold


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bacth]\nsize = 1\n", "there is no section [bacth]"),
        ("[batch]\nsise = 1\n", "[batch] has no key 'sise'"),
        ("size = 1\n", "the key 'size' stands outside every section"),
        ("[batch\n", "is not valid TOML"),
        ('[batch]\nsize = "many"\n', "[batch] size = 'many': expected a whole number, got text"),
        ("[batch]\nsize = 0\n", "[batch] size = 0: expected a whole number >= 1"),
        ("[batch]\nsize = true\n", "[batch] size = True: expected a whole number, got true or"),
        ("[batch]\ninterval = inf\n", "[batch] interval = inf: expected a number <= 31536000"),
        ("[batch]\ninterval = nan\n", "[batch] interval = nan: expected a number > 0"),
        ('[spool]\ndurability = "best"\n', "[spool] durability = 'best': invalid enum value"),
        ('[documents]\nroots = "docs"\n', "[documents] roots = 'docs': expected a list, got text"),
        ('[documents]\nroots = ["a", 1]\n', "expected text, got a whole number, at [1]"),
        ('[documents]\nextensions = ["md"]\n', "'md' (from "),
        ("[documents.rules]\ntipes = []\n", "object contains unknown field 'tipes'"),
        ('[[documents.rules.tags]]\ntag = "x"\ncontent = "["\n', "is not a regular expression"),
        ("[batch]\nsize = 9\nmax_size = 8\n", "is larger than max_size (8)"),
        ('[pending]\nbacklog = ""\n', "[pending] backlog = ''"),
        ('[pending]\ntables = ["a.b.c"]\n', "'a.b.c' (from "),
    ],
)
def test_a_mistake_is_refused_with_file_section_and_key(text: str, message: str):
    error = refusal(text)
    assert message in str(error)
    assert error.remedy
    if (
        "batch] size (" not in str(error)
        and "rules]" not in str(error)
        and "(from " not in str(error)
    ):
        assert str(error).startswith(str(Path("helena.toml").absolute()))


def test_a_mistyped_name_is_recognised():
    assert "Did you mean 'batch'?" in refusal("[bacth]\n").remedy
    assert "Did you mean 'interval'?" in refusal("[batch]\nintreval = 1\n").remedy


def test_a_value_that_may_hold_a_password_is_never_repeated():
    error = refusal('[database]\ndsn = ["postgresql://u:secret@h/d"]\n')
    assert "[database] dsn: expected text" in str(error)
    assert "secret" not in f"{error} {error.remedy}"


# The environment


def test_every_key_has_a_variable():
    settings = load(
        environ={
            "HELENA_BATCH_SIZE": "200",
            "HELENA_BATCH_MAX_SIZE": "300",
            "HELENA_SPOOL_DURABILITY": "power",
            "HELENA_DOCUMENTS_EXTENSIONS": ".md, .txt",
            "HELENA_DOCUMENTS_ON_MISSING": "ignore",
            "HELENA_DOCUMENTS_RULES": '{"default_type": "note"}',
        }
    )
    assert (settings.batch.size, settings.batch.max_size) == (200, 300)
    assert settings.spool.durability == "power"
    assert settings.documents.extensions == (".md", ".txt")
    assert settings.documents.on_missing == "ignore"
    assert settings.documents.rules.default_type == "note"


@pytest.mark.parametrize(
    ("name", "value"),
    [("HELENA_BATCH_SIZE", "many"), ("HELENA_BATCH_SISE", "1"), ("HELENA_DOCUMENTS_RULES", "{")],
)
def test_a_mistake_in_the_environment_names_the_variable(name: str, value: str):
    assert f"the environment variable {name}" in str(refusal(**{name: value}))


def test_the_state_directory_can_be_moved():
    assert load(environ={"HELENA_STATE_DIR": "/srv/h"}).state_dir == Path("/srv/h")
    assert load(environ={}).state_dir.name == "helena"


# Roots


def test_roots_of_a_file_are_relative_to_its_folder_and_others_to_the_current_one():
    path = written('[documents]\nroots = ["docs", "/abs", "../up"]\n', "etc/helena.toml")
    here = str(Path.cwd())
    assert load(file=path, environ={}).documents.roots == (f"{here}/etc/docs", "/abs", f"{here}/up")
    named = load(file=path, environ={"HELENA_DOCUMENTS_ROOTS": "docs,~"}).documents.roots
    assert named == (f"{here}/docs", os.environ["HOME"])


def test_pending_folders_lie_beside_the_file_unless_a_variable_names_them():
    path = written('[pending]\ntasks = "../tasks"\n', "etc/helena.toml")
    here = str(Path.cwd())
    pending = load(file=path, environ={"HELENA_PENDING_OPERATIONS": "left"}).pending
    assert pending.tasks == f"{here}/tasks"
    assert pending.backlog == f"{here}/etc/sql/realtime_updates"
    assert pending.operations == f"{here}/left"
    assert pending.tables == ()


# The database


def test_the_dsn_is_chosen_in_the_documented_order():
    environ = {"HELENA_DSN": "host=b", "DATABASE_URL": "host=d", "PGHOST": "e"}
    options = {"database": {"dsn": "host=a"}}
    written('[database]\ndsn = "host=c"\n')

    def chosen() -> tuple[str | None, str]:
        settings = load(environ=environ, options=options)
        return settings.database.dsn, settings.origin("database.dsn")

    assert chosen() == ("host=a", "--dsn")
    options.clear()
    assert chosen() == ("host=b", "HELENA_DSN")
    del environ["HELENA_DSN"]
    assert chosen() == ("host=c", str(Path("helena.toml").absolute()))
    written("")
    assert chosen() == ("host=d", "DATABASE_URL")
    del environ["DATABASE_URL"]
    assert chosen() == ("", "PGHOST")
    del environ["PGHOST"]
    assert chosen() == (None, "the default")


def test_an_empty_dsn_option_does_not_fall_through_to_another_database():
    with pytest.raises(UsageError, match="--dsn is empty"):
        load(environ={"DATABASE_URL": "host=other"}, options={"database": {"dsn": " "}})


SECRET = [
    "postgresql://u:secret@h/d",
    "postgres://u:se#cr?et@h/d",
    "postgres://u:se/cret@h/d",
    "postgresql://:secret@h1:1,h2:2/d",
    "postgresql://u:secret@",
    "postgresql://h/d?password=secret",
    "postgresql://h/d?PASSWORD=secret",
    "postgresql://h/d?%70assword=secret",
    "postgresql://h/d?sslpassword=secret",
    "host=h password=secret",
    "host=h PASSWORD = 'secret'",
    "host=h sslpassword=secret",
    "postgresql://[::1/d?password=secret",
]
OPEN = [
    "postgresql://u@h:5432/d",
    "postgresql://h:5432/d?options=a@b",
    "postgresql://u@[::1]:5432/d",
    "postgresql://u:@h/d",
    "postgresql:///d?host=/run/postgresql&user=u",
    "host=h user=u passfile=/x",
    "dbname=d",
    "",
]


@pytest.mark.parametrize("dsn", SECRET)
def test_a_password_on_the_command_line_is_refused_with_a_remedy(dsn: str):
    assert has_password(dsn)
    with pytest.raises(UsageError) as caught:
        load(environ={}, options={"database": {"dsn": dsn}})
    assert "HELENA_DSN" in caught.value.remedy
    assert "secret" not in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize("dsn", OPEN)
def test_an_address_without_a_password_is_let_through(dsn: str):
    assert not has_password(dsn)
