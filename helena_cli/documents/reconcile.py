"""Compare what is on the disk with what is known, and queue the difference.

This is the one way into the database for documents: a command, a file event and the periodic rescan
all come here, with more or fewer paths. Nothing here asks, prints or deletes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import batched
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from msgspec import Struct
