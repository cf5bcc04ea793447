"""`helena init`: what it makes, what it leaves alone, and who may run it."""

import psycopg

from helena_cli.database import schema


def test_tables_are_made_once_and_then_left_alone(dsn):
    with psycopg.connect(dsn, autocommit=True) as connection:
        created = schema.initialise(connection)
        assert created == ["schema helena, version 1", *(f"table {name}" for name in schema.TABLES)]
        identity = schema.target_id(connection)
        assert schema.initialise(connection) == []
        assert schema.target_id(connection) == identity


def test_each_copy_of_the_template_is_a_database_of_its_own(helena_dsn, _template, postgres):
    with psycopg.connect(helena_dsn) as copy:
        mine = schema.target_id(copy)
    with psycopg.connect(psycopg.conninfo.make_conninfo(postgres, dbname=_template)) as template:
        assert schema.target_id(template) != mine
def test_p(proxy):
    with psycopg.connect(proxy.dsn) as c: schema.target_id(c)
def test_p15(postgres15):
    with psycopg.connect(postgres15) as c: c.execute("select 1")
