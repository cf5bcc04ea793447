"""Helena saves PostgreSQL databases from real-time writers.

A durable queue and one polite writer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helena_cli.library import (
        BatchEngine,
        add_agent_context,
        add_document_reference,
        add_message,
        add_operation,
        add_operations,
        flush,
        log_document_usage,
    )

__all__ = [
    "BatchEngine",
    "add_agent_context",
    "add_document_reference",
    "add_message",
    "add_operation",
    "add_operations",
    "flush",
    "log_document_usage",
]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that `import helena_cli` costs next to nothing."""
    if name in __all__:
        from helena_cli import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
