"""Another process that reads files: it is given candidates, and answers.

It speaks through its standard input and output alone. It ends when they are closed, so it does not
outlive whoever started it, however that one ends; and it has nothing that could be lost.
"""

import fcntl
import gc
import os
import pickle
import select
import struct
import subprocess
import sys
from collections import deque
from contextlib import suppress
from typing import Any, BinaryIO

from helena_cli.documents.candidate import Chunk, answer
from helena_cli.settings import DocumentSettings

#: What the process runs. Its modules are found where they were found here, and nowhere else.
_CODE = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer);"
    " from helena_cli.documents import reader; reader.serve()"
)

#: Answers go before themselves with their length.
_LENGTH = struct.Struct("<I")

#: So much may lie in the pipe: the process goes on while nobody takes its answers. Bytes.
_PIPE = 1024 * 1024
#: A piece of it; room for more at once costs more than it saves. Bytes.
_PIECE = 64 * 1024

#: What a process that has ended raises.
GONE = (OSError, EOFError)


class Reader:
    """The process. All but `close` raise one of GONE when it has ended."""

    def __init__(self, settings: DocumentSettings) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        with suppress(OSError, AttributeError):
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE)
        self._answered, self._usable = select.poll(), select.poll()
        self._answered.register(self._out, select.POLLIN)
        self._usable.register(self._out, select.POLLIN)
        self._usable.register(self._in, select.POLLOUT)
        self._received = bytearray()
        #: Whether it has started: until then it is better not to wait for it.
        self.ready = False
        #: What it has been given, the oldest first.
        self.chunks: deque[Chunk] = deque()
        # If it has ended already, the next look says so.
        with suppress(*GONE):
            self._write(pickle.dumps(sys.path) + pickle.dumps((settings, gc.get_threshold())))

    def give(self, chunk: Chunk) -> None:
        """Let it read these."""
        self.chunks.append(chunk)
        self._write(pickle.dumps((chunk.root, chunk.candidates)))

    def look(self, *, wait: bool = False) -> None:
        """Note which chunks have been answered; with `wait`, not before there is something new."""
        while self._answered.poll(None if wait else 0):
            self._receive()
            wait = False

    def close(self) -> None:
        """End it at once."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()
        self._process.wait()

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            # Were its answers left where they are, it would wait for us, and we for it.
            for end, _ in self._usable.poll():
                if end == self._out:
                    self._receive()
                else:
                    with suppress(BlockingIOError):
                        rest = rest[os.write(self._in, rest) :]

    def _receive(self) -> None:
        piece = os.read(self._out, _PIECE)
        if not piece:
            raise EOFError
        self._received += piece
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            answers = pickle.loads(self._received[_LENGTH.size : end])
            del self._received[:end]
            if self.ready:
                self.chunks.popleft().answers = answers
            self.ready = True


def serve() -> None:
    """What the process does."""
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    # Whoever asks has gone, or wants no more answers.
    with suppress(*GONE, KeyboardInterrupt):
        settings, threshold = pickle.load(questions)
        # As seldom as whoever asks: documents leave no garbage, and to look for it takes time.
        gc.set_threshold(*threshold)
        _send(answers, None)
        while True:
            root, candidates = pickle.load(questions)
            _send(answers, [answer(candidate, root, settings) for candidate in candidates])


def _send(stream: BinaryIO, value: Any) -> None:
    content = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()
