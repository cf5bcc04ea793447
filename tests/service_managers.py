"""Stand-ins for systemctl and launchctl: they record what they are told, and answer alike.

The answers are those of systemd 252 and of launchd on macOS 14, cut down to what Helena reads.
"""

from pathlib import Path

#: Remembers in files of $D whether the unit is enabled, active or failed.
SYSTEMCTL = r"""
[ -e "$D/away" ] && { echo "Failed to connect to bus: No medium found" >&2; exit 1; }
[ "$1 $2" = "--user --no-pager" ] || { echo "the user's manager was not meant" >&2; exit 1; }
shift 2
case $1 in
show)
    [ "$2" = --property=Version ] && { echo Version=252.39-1; exit; }
    state=ActiveState=inactive sub=SubState=dead pid=0 ended=0 how=0 code=0 enabled=
    [ -e "$D/enabled" ] && enabled=enabled
    [ -e "$D/active" ] && state=ActiveState=active sub=SubState=running pid=$(cat "$D/active")
    [ -e "$D/failed" ] && state=ActiveState=failed sub=SubState=failed ended=1 how=1 code=3
    [ -e "$D/killed" ] && state=ActiveState=failed sub=SubState=failed ended=1 how=2 code=9
    echo "UnitFileState=$enabled" $state $sub MainPID=$pid NRestarts=2 ExecMainCode=$how \
        ExecMainStatus=$code ExecMainExitTimestampMonotonic=$ended | tr ' ' '\n'
    echo "StatusText=watching 2 folders" ;;
enable) touch "$D/enabled" ;;
disable) rm "$D/enabled" ;;
restart)
    [ -e "$D/broken" ] && { touch "$D/failed"; echo "Job for $2 failed." >&2; exit 1; }
    rm -f "$D/failed"; cat "$D/pid" > "$D/active" ;;
stop) rm "$D/active" ;;
reset-failed) [ -e "$D/failed" ] || exit 1; rm "$D/failed" ;;
daemon-reload) ;;
*) echo "Unknown command verb $1." >&2; exit 1 ;;
esac
"""

LOGINCTL = r"""
[ -e "$D/linger" ] && echo Linger=yes || echo Linger=no
"""

JOURNALCTL = r"""
[ -e "$D/broken" ] && echo "helena: There is no section [batsh]."
exit 0
"""

LAUNCHCTL = r"""
target=gui/$(id -u)
case $1 in
print)
    [ -e "$D/away" ] && { echo "Could not find domain for user" >&2; exit 112; }
    [ "$2" = "$target" ] && { echo "$target = {"; exit; }
    [ -e "$D/active" ] || { echo "Could not find service" >&2; exit 113; }
    pid=$(cat "$D/active")
    printf '%s = {\n\tactive count = 1\n\tstate = %s\n\n' "$2" "${pid:+running}"
    printf '\targuments = {\n\t\tstate = no\n\t}\n\truns = 3\n'
    [ "$pid" ] && printf '\tpid = %s\n' "$pid"
    [ -e "$D/killed" ] && printf '\tlast terminating signal = Killed: 9\n'
    printf '\tlast exit code = 3: EX_CONFIG\n}\n' ;;
print-disabled)
    printf '\tdisabled services = {\n'
    [ -e "$D/disabled" ] && printf '\t\t"helena_batch_processor" => disabled\n'
    printf '\t}\n' ;;
enable) rm -f "$D/disabled" ;;
bootstrap)
    [ -e "$D/active" ] && { echo "Bootstrap failed: 5: Input/output error" >&2; exit 5; }
    [ -e "$D/broken" ] && : > "$D/active" || cat "$D/pid" > "$D/active" ;;
bootout) rm "$D/active" ;;
*) exit 64 ;;
esac
"""

PROGRAMS = {
    "systemctl": SYSTEMCTL,
    "loginctl": LOGINCTL,
    "journalctl": JOURNALCTL,
    "launchctl": LAUNCHCTL,
}


class Managers:
    """The stand-ins in a folder for PATH. The service's process is `pid`."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        (folder / "pid").write_text(str(pid))
        for name, script in PROGRAMS.items():
            program = folder / name
            record = f'echo "{name} $*" >> "$D/calls"'
            program.write_text(f"#!/bin/sh\nD='{folder}'\n{record}\n{script}")
            program.chmod(0o755)

    def given(self, *facts: str) -> None:
        """From now on this is so: away, broken, linger, disabled ..."""
        for fact in facts:
            (self.folder / fact).touch()

    def no_more(self, fact: str) -> None:
        (self.folder / fact).unlink()

    def told(self) -> list[str]:
        """What they were told to change since the last look, without the questions."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        plain = [line.replace("systemctl --user --no-pager", "systemctl") for line in lines]
        return [line for line in plain if " show" not in line and " print" not in line]
