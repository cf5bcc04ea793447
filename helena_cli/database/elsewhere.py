"""From where all sessions of a server can be seen when one of its databases lets nobody in."""

#: A database that is there to be copied. Nobody may be connected to it longer than for a question:
#: CREATE DATABASE waits a few seconds for those to go, and fails.
TEMPLATE = "template1"

#: Databases that servers have by default, in the order in which to try them.
PLACES = ("postgres", TEMPLATE)
