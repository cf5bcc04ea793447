"""Ports of loopback, for servers that go away and come back."""

import random
import socket
from contextlib import suppress

#: Below those that systems give to clients. Whoever looks for a server that is away could be given
#: its very port there, be connected with itself, and keep the server from coming back.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """One that nobody listens on."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
