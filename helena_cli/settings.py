"""What can be set: frozen records with their defaults. `config.load` fills them in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

#: A year at most: "inf" would be a number too, and no timer can wait for it.
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Interval = Annotated[float, Meta(gt=0, le=31_536_000)]
Count = Annotated[int, Meta(ge=1, le=2**63 - 1)]

MIB = 1024 * 1024


class DatabaseSettings(Struct, frozen=True):
    """Where the database is: dsn None is the embedded PostgreSQL, "" are libpq's own variables."""

    dsn: str | None = None
    #: Past a pooler, for what a pooler refuses (VACUUM); None: `dsn` is direct already.
    direct_dsn: str | None = None
    connect_timeout: Interval = 5.0


class BatchSettings(Struct, frozen=True):
    """When a flush happens and how large it may be. Seconds and bytes."""

    size: Count = 100
    interval: Interval = 5.0
    max_size: Annotated[int, Meta(ge=1, le=50_000)] = 5000
    max_bytes: Annotated[int, Meta(ge=1, le=256 * MIB)] = 16 * MIB
    max_operation_bytes: Annotated[int, Meta(ge=1, le=256 * MIB)] = 8 * MIB
    lane_timeout: Interval = 86_400.0
    shutdown_timeout: Seconds = 10.0


class SpoolSettings(Struct, frozen=True):
    """How the local queue is kept."""

    durability: Literal["process", "power"] = "process"
    max_bytes: Annotated[int, Meta(ge=MIB)] = 4096 * MIB


class TypeRule(Struct, frozen=True, forbid_unknown_fields=True):
    """A document is of this type when its lower-cased name, or its text, matches each pattern."""

    type: str
    name: str | None = None
    content: tuple[str, ...] = ()


class TagRule(Struct, frozen=True, forbid_unknown_fields=True):
    """A document gets this tag when its lower-cased text matches, or always without a pattern."""

    tag: str
    content: str | None = None


class PathRule(Struct, frozen=True, forbid_unknown_fields=True):
    """A document whose path relative to its root matches gets this value."""

    value: str
    path: str


class Rules(Struct, frozen=True, forbid_unknown_fields=True):
    """How documents are classified. In each list of `types` and paths the first match wins."""

    types: tuple[TypeRule, ...] = (
        TypeRule("protocol", name="protocol|process"),
        TypeRule("guide", name="guide|tutorial"),
        TypeRule("team_documentation", name="team|agent"),
        TypeRule("analysis", name="analysis|report"),
        TypeRule("status_report", name="status|summary"),
        TypeRule("architecture", name="architecture|design"),
        TypeRule("api_documentation", name="api"),
        TypeRule("commit", name="commit"),
        TypeRule("protocol", content=("protocol", "procedure")),
        TypeRule("team_documentation", content=("agent", "role|responsibility")),
        TypeRule("architecture", content=("architecture|system design",)),
    )
    default_type: str = "general_documentation"
    tags: tuple[TagRule, ...] = (
        TagRule("markdown"),
        TagRule("postgresql", content="postgres"),
        TagRule("performance", content="performance"),
        TagRule("critical", content="critical"),
        TagRule("batch-processing", content="batch"),
    )
    investigations: tuple[PathRule, ...] = ()
    default_investigation: str = "general"
    classifications: tuple[PathRule, ...] = ()


class DocumentSettings(Struct, frozen=True):
    """Which documents are indexed and how."""

    roots: tuple[str, ...] = ()
    namespace: str = ""
    index: str = "osint_reports_pdf"
    extensions: tuple[str, ...] = (".md", ".markdown")
    ignore: tuple[str, ...] = (".*", "node_modules", "__pycache__", "venv")
    preview_chars: Annotated[int, Meta(ge=0, le=100_000)] = 500
    max_bytes: Count = 100 * MIB
    on_missing: Literal["mark", "ignore"] = "mark"
    announce: Literal["batch", "document", "none"] = "batch"
    rules: Rules = Rules()


Folder = Annotated[str, Meta(min_length=1)]


class PendingSettings(Struct, frozen=True):
    """The folders with files that programs left behind; `config.load` makes them absolute.

    `tables` are those that the files of the backlog may write besides Helena's own.
    """

    operations: Folder = "helena_batch_pending"
    tasks: Folder = "helena_tasks"
    backlog: Folder = "sql/realtime_updates"
    tables: tuple[str, ...] = ()


class WatchSettings(Struct, frozen=True):
    """How `helena watch` follows its folders. Seconds."""

    settle: Seconds = 0.5
    max_wait: Interval = 3.0
    grace: Seconds = 2.0
    rescan: Interval = 900.0
    polling: Literal["auto", "always", "never"] = "auto"
    polling_interval: Interval = 5.0


class MetricsSettings(Struct, frozen=True):
    """Where a running `helena watch` can be asked over HTTP."""

    enabled: bool = True
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8080


class RealtimeSettings(Struct, frozen=True):
    """The old real-time writers, for `helena stop-realtime`.

    `processes` are stems of scripts or names of modules that an interpreter runs; `services` are
    units and jobs of a supervisor. Seconds.
    """

    processes: tuple[str, ...] = (
        "helena_realtime_processor",
        "realtime_md_watcher",
        "morning_brief",
    )
    services: tuple[str, ...] = ()
    grace: Seconds = 10.0
    quiet: Seconds = 12.0


class CheckSettings(Struct, frozen=True):
    """The limits of the checklist of `helena status`."""

    longest_query_seconds: Interval = 10.0
    response_ms: Interval = 100.0
    operations_per_second: Interval = 500.0
    queue_age_seconds: Interval = 60.0


class Settings(Struct, frozen=True):
    """Everything that can be set, after all sources have been merged."""

    database: DatabaseSettings = DatabaseSettings()
    batch: BatchSettings = BatchSettings()
    spool: SpoolSettings = SpoolSettings()
    documents: DocumentSettings = DocumentSettings()
    pending: PendingSettings = PendingSettings()
    watch: WatchSettings = WatchSettings()
    metrics: MetricsSettings = MetricsSettings()
    realtime: RealtimeSettings = RealtimeSettings()
    checks: CheckSettings = CheckSettings()
    state_dir: Path = Path()
    config_file: Path | None = None
    #: "section.key" → the file, variable or option that set it; a default is absent.
    origins: Mapping[str, str] = {}

    def origin(self, name: str) -> str:
        """Where the value of "section.key" came from, for messages."""
        return self.origins.get(name, "the default")


SECTIONS: Mapping[str, type[Struct]] = {
    "database": DatabaseSettings,
    "batch": BatchSettings,
    "spool": SpoolSettings,
    "documents": DocumentSettings,
    "pending": PendingSettings,
    "watch": WatchSettings,
    "metrics": MetricsSettings,
    "realtime": RealtimeSettings,
    "checks": CheckSettings,
}
