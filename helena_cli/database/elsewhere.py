"""From where all sessions of a server can be seen when one of its databases lets nobody in."""

#: What a person can do when none of them lets anybody in.
SHUT = (
    "Where ps shows processes of PostgreSQL in 'authentication waiting' or 'startup waiting', "
    "somebody has locked pg_authid or pg_database, and nobody can log in: there end the one that "
    "is 'idle in transaction' with kill -TERM, never -9."
)

#: A database that is there to be copied. Nobody may be connected to it longer than for a question:
#: CREATE DATABASE waits a few seconds for those to go, and fails.
TEMPLATE = "template1"

#: Databases that servers have by default, in the order in which to try them.
PLACES = ("postgres", TEMPLATE)
