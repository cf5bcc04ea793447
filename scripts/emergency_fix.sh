#!/bin/sh
# Frees a stuck PostgreSQL database with nothing but sh and psql, for the day when Python is broken
# too. `emergency_fix.sh --help` says what it does; `helena clear-locks` does it with more care.
#
# Plain POSIX sh, so that any sh runs it: no local variables, no arrays. A function that answers with
# more than its exit code names in capitals the variables that it sets.
#
# shellcheck disable=SC2317 # for_each_row calls functions by their names.

set -u
# Lines of the database are split at separators; a * in a query is not a pattern.
set -f
# One meaning of a character, a sort order and a message for every tool.
LC_ALL=C
export LC_ALL
# Some ps cut their lines to it.
unset COLUMNS

newline='
'
# Between the fields of a row: the SQL below removes control characters from everything it shows.
separator=$(printf '\037')
default_separators=$IFS

usage() {
    cat <<'HELP'
Usage: emergency_fix.sh [--dry-run] [PHASE...]

Frees a stuck PostgreSQL database. Needs psql; asks nothing; may be run again at any time.
The phases, all of them when none is named:

  activity  shows what is going on
  sessions  ends what holds others up, and queries that run longer than 5 minutes: queries are
            cancelled, and terminated if they do not go; a session that is idle in a transaction is
            terminated if it holds others up; a queued ALTER TABLE is cancelled if others wait
            only for it. Left alone: other databases, background processes, running VACUUMs,
            advisory locks, and superusers' sessions unless you are one.
  writers   stops your own real-time writers: TERM, and KILL after 5 seconds
  gin       empties the pending lists of the GIN indexes that are yours
  vacuum    VACUUM (ANALYZE) of Helena's tables and of those that were waited for, if they are yours
  result    shows what is left

  --dry-run  shows what would be done, and does nothing
  --help     shows this

The database: HELENA_DATABASE_DIRECT_DSN, else HELENA_DSN, HELENA_DATABASE_DSN or DATABASE_URL (a
URI or key=value pairs), else psql's own PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSERVICE,
~/.pgpass. In a URI write @ as %40, / as %2F and % as %25 when they belong to the password.
helena.toml is not read. VACUUM needs PostgreSQL itself, not a pooler.

  HELENA_EMERGENCY_SECONDS         a query may run this long (300)
  HELENA_EMERGENCY_WAIT            who waits for less than this is not held up, who is idle for less
                                   than this may still commit (10)
  HELENA_EMERGENCY_VACUUM_SECONDS  a VACUUM may take this long (600)
  HELENA_EMERGENCY_TABLES          further tables to VACUUM, separated by commas
  HELENA_REALTIME_PROCESSES        the writers' scripts or modules, separated by commas
                                   (helena_realtime_processor,realtime_md_watcher,morning_brief)

Exit codes: 0 done, 1 something could not be done (it is listed at the end), 2 wrong usage,
3 wrong configuration, 4 the database cannot be reached, 130 interrupted.
HELP
}

say() {
    printf '%s\n' "$*"
}

many() {
    [ "$1" = 1 ] || set -- "$1" "$2s"
    say "$1 $2"
}

phase() {
    printf '\n%s\n' "$*"
}

# Goes on with the next step; the list is shown at the end.
fail() {
    say "   FAILED: $*"
    failures="$failures  - $*$newline"
}

give_up() {
    code=$1
    shift
    printf 'emergency_fix.sh: %s\n' "$*" >&2
    exit "$code"
}

wants() {
    case " $phases " in *" $1 "*) return 0 ;; esac
    return 1
}

# Where the database is

# Prints assignments of libpq's variables for a DSN, quoted for eval; or of `wrong`. The DSN comes in
# the environment, where other users cannot read it as they can read arguments.
dsn_variables() {
    dsn="$dsn" awk '
    function quoted(text,    parts, count, i, result) {
        count = split(text, parts, "\047")
        result = parts[1]
        for (i = 2; i <= count; i++) result = result "\047\\\047\047" parts[i]
        return "\047" result "\047"
    }
    function refuse(reason) {
        print "wrong=" quoted(reason)
        refused = 1
        exit
    }
    function digit(letter) {
        return letter == "" ? -1 : index("0123456789abcdef", tolower(letter)) - 1
    }
    function decoded(text,    result, i, high, low) {
        while (i = index(text, "%")) {
            high = digit(substr(text, i + 1, 1))
            low = digit(substr(text, i + 2, 1))
            if (high < 0 || low < 0 || high + low == 0)
                refuse("a % in it is not followed by two hexadecimal digits: write % as %25")
            result = result substr(text, 1, i - 1) sprintf("%c", high * 16 + low)
            text = substr(text, i + 3)
        }
        return result text
    }
    function set(key, value) {
        if (key == "ssl" && value == "true") { key = "sslmode"; value = "require" }
        if (key == "dbname") key = "database"
        # These are set for each connection.
        if (key ~ /^(connect_timeout|application_name|fallback_application_name|client_encoding)$/)
            return
        if (index(KNOWN, " " key " ") == 0) { unknown = unknown " " key; return }
        gsub(/_/, "", key)
        values["PG" toupper(key)] = value
    }
    function host_list(text,    parts, count, i, end, tail, colon, host, hosts, ports) {
        count = split(text, parts, ",")
        for (i = 1; i <= count; i++) {
            # An IPv6 address stands in brackets, and has colons of its own.
            end = substr(parts[i], 1, 1) == "[" ? index(parts[i], "]") : 0
            tail = substr(parts[i], end + 1)
            colon = index(tail ":", ":")
            host = end ? substr(parts[i], 2, end - 2) : decoded(substr(tail, 1, colon - 1))
            hosts = hosts (i > 1 ? "," : "") host
            ports = ports (i > 1 ? "," : "") substr(tail, colon + 1)
        }
        if (hosts ~ /[^,]/) set("host", hosts)
        if (ports ~ /[^,]/) set("port", ports)
    }
    function uri(text,    at, slash, mark, query, parts, count, i, user) {
        at = match(text, /[@\/]/)
        if (at && substr(text, at, 1) == "@") {
            user = substr(text, 1, at - 1)
            text = substr(text, at + 1)
            i = index(user, ":")
            set("user", decoded(i ? substr(user, 1, i - 1) : user))
            if (i) set("password", decoded(substr(user, i + 1)))
        }
        mark = index(text, "?")
        if (mark) { query = substr(text, mark + 1); text = substr(text, 1, mark - 1) }
        if (index(text, "@"))
            refuse("it has a second @, or a / before the @: write @ as %40 and / as %2F")
        slash = index(text, "/")
        if (slash && slash < length(text)) set("dbname", decoded(substr(text, slash + 1)))
        host_list(slash ? substr(text, 1, slash - 1) : text)
        count = split(query, parts, "&")
        for (i = 1; i <= count; i++) {
            at = index(parts[i], "=")
            if (!at) refuse("something behind the ? has no =")
            set(decoded(substr(parts[i], 1, at - 1)), decoded(substr(parts[i], at + 1)))
        }
    }
    function pairs(text,    key, value, letter, inside) {
        while (match(text, /[^ \t\r\n]/)) {
            text = substr(text, RSTART)
            if (!match(text, /^[a-zA-Z_]+[ \t\r\n]*=[ \t\r\n]*/))
                refuse("it is neither a URI nor a list of key=value")
            key = substr(text, 1, RLENGTH)
            sub(/[ \t\r\n]*=.*/, "", key)
            text = substr(text, RLENGTH + 1)
            inside = substr(text, 1, 1) == "\047"
            if (inside) text = substr(text, 2)
            value = ""
            for (;;) {
                letter = substr(text, 1, 1)
                if (letter == "" && inside) refuse("a quote in it is not closed")
                if (letter == "") break
                text = substr(text, 2)
                if (letter == "\\") { letter = substr(text, 1, 1); text = substr(text, 2) }
                else if (inside ? letter == "\047" : letter ~ /[ \t\r\n]/) break
                value = value letter
            }
            set(key, value)
        }
    }
    BEGIN {
        KNOWN = " host hostaddr port database user password passfile service require_auth options" \
            " channel_binding sslmode sslcompression sslcert sslkey sslcertmode sslrootcert sslcrl" \
            " sslcrldir sslsni requirepeer ssl_min_protocol_version ssl_max_protocol_version" \
            " gssencmode krbsrvname gsslib gssdelegation target_session_attrs load_balance_hosts "
        dsn = ENVIRON["dsn"]
        # SQLAlchemy names a driver there.
        if (sub(/^postgres(ql)?(\+[a-z0-9]+)?:\/\//, "", dsn)) uri(dsn)
        else if (dsn ~ /=/) pairs(dsn)
        else if (dsn !~ /[:\/@]/) set("dbname", dsn)
        else refuse("it is neither postgresql://... nor a list of key=value")
    }
    END {
        if (refused) exit
        # A service would go before the variables.
        if (!("PGSERVICE" in values)) print "unset PGSERVICE"
        for (name in values) print name "=" quoted(values[name]) "; export " name
        print "unknown=" quoted(unknown)
    }' </dev/null
}

# Sets the variables of libpq from the DSN, and SOURCE.
read_dsn() {
    SOURCE="psql's own variables"
    for name in HELENA_DATABASE_DIRECT_DSN HELENA_DSN HELENA_DATABASE_DSN DATABASE_URL; do
        eval "dsn=\${$name-}"
        if [ -n "$dsn" ]; then
            SOURCE=$name
            wrong=''
            unknown=''
            assignments=$(dsn_variables)
            eval "$assignments"
            dsn=''
            [ -z "$wrong" ] || give_up 3 "$name cannot be used: $wrong."
            [ -z "$unknown" ] || say "Without a variable of libpq, so not used:$unknown (of $name)."
            return
        fi
    done
}

# Asking the database

# Runs a command with this stdin for so many seconds at most. SIGINT makes psql cancel its query. For
# subshells: it sets traps.
bounded() {
    limit=$1
    shift
    child=''
    guard=''
    trap 'kill -s INT $child; kill $guard; exit 130' INT TERM HUP
    exec 3<&0
    "$@" <&3 2>&1 &
    child=$!
    # Without a trap, and asleep for a second at most: it dies at once when it is no longer needed.
    (
        # Not behind the parenthesis: some shells keep the old ones open there, and the reader waits.
        exec </dev/null >/dev/null 2>&1 3<&-
        while [ "$limit" -gt 0 ]; do
            sleep 1
            kill -s 0 "$child" || exit
            limit=$((limit - 1))
        done
        for signal in INT TERM KILL; do
            kill -s "$signal" "$child" || exit
            sleep 2
        done
    ) &
    guard=$!
    exec 3<&-
    wait "$child" 2>/dev/null
    code=$?
    kill "$guard" 2>/dev/null
    return "$code"
}

# Runs SQL within so many seconds. Sets ROWS (lines that begin with @, without it) and MESSAGES, and
# returns psql's exit code.
ask() {
    answer=$(
        printf '%s\n' "$2" | bounded "$1" psql -X -w -q -A -t -F "$separator" \
            -v ON_ERROR_STOP="${stop_at_errors:-1}" -v VERBOSITY=terse -v target="$target" \
            -v wait="$wait" -v long="$long" -v names="$tables" -v oids="$affected" \
            -d "$connection"
    )
    code=$?
    ROWS=$(printf '%s\n' "$answer" | sed -n "s/^@$separator//p")
    MESSAGES=$(
        printf '%s\n' "$answer" | tr -d '\001-\011\013-\037\177' |
            sed -e '/^@/d' -e '/^$/d' -e 's/^psql:<stdin>:[0-9]*: //' -e 3q
    )
    [ "$code" -eq 0 ] || [ -n "$MESSAGES" ] || MESSAGES="no answer within $1 seconds"
    return "$code"
}

# Calls a function with the fields of each row as arguments.
for_each_row() {
    IFS=$newline
    for row in $ROWS; do
        IFS=$separator
        # shellcheck disable=SC2086 # It is to be split.
        set -- "$1" $row
        IFS=$default_separators
        "$@"
    done
    IFS=$default_separators
}

# A transaction with limits of its own: a SET outside one would stay behind in a pooler.
transaction() {
    printf '%s\n' "BEGIN; SET LOCAL statement_timeout = '${2:-10s}'; SET LOCAL lock_timeout = '500ms';" \
        'SET LOCAL standard_conforming_strings = on;' "$1;" 'COMMIT;'
}

# Tries the database itself, then `postgres` on the same server, from where all sessions can be seen:
# with pg_class locked no new session gets into the database. Sets REACHED to target, server or "".
connect() {
    limits="connect_timeout=5 application_name=helena_emergency_fix"
    connection=$limits
    question="SELECT '@', current_user, current_setting('server_version'), pg_is_in_recovery(),
        pg_has_role('pg_read_all_stats', 'USAGE'), current_database()"
    if ask 20 "$(transaction "$question")"; then
        REACHED=target
    else
        problem=$MESSAGES
        REACHED=''
        # The name of a service's database is not known here.
        [ -z "${PGSERVICE-}" ] || return 1
        target=${PGDATABASE:-${PGUSER:-$(id -un)}}
        connection="dbname=postgres $limits"
        question="$question FROM pg_database WHERE datname = :'target'"
        ask 20 "$(transaction "$question")" && [ -n "$ROWS" ] || return 1
        REACHED=server
    fi
    for_each_row connected
}

connected() {
    user=$1
    in_recovery=$3
    [ "$REACHED" = server ] || target=$5
    if [ -z "$greeted" ]; then
        greeted=yes
        say "Database $target on ${PGHOST:-${PGSERVICE:-the local server}}, PostgreSQL $2, as $user" \
            "(from $SOURCE)."
        [ "$4" = t ] || say "Not a member of pg_read_all_stats or pg_monitor: what other" \
            "users' sessions do cannot be seen, and they are left alone."
        [ "$REACHED" = target ] || say "It lets nobody in; working from the database postgres:" \
            "$problem"
    fi
}

# What the sessions do, and who waits for whom. `mark` tells a session and what it is at from all
# others; `untouchable` is the reason why it must be left alone.
graph() {
    cat <<'SQL'
WITH lock AS MATERIALIZED (
  SELECT l.pid, l.locktype, l.database, l.mode, l.granted,
         ROW(l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid,
             l.classid, l.objid, l.objsubid)::text AS object,
         -- A column since PostgreSQL 14.
         (to_jsonb(l) ->> 'waitstart')::timestamptz AS since
    FROM pg_locks l),
session AS MATERIALIZED (
  SELECT a.pid, a.datname, a.backend_type, a.xact_start, a.query_start, a.state_change,
         coalesce(a.state, 'hidden') AS state,
         extract(epoch FROM clock_timestamp() - CASE WHEN a.state = 'active' THEN a.query_start
                                                     ELSE a.state_change END)::bigint AS seconds,
         concat_ws('/', to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                        to_char(a.query_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                        to_char(a.xact_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                        replace(a.state, ' ', '_')) AS mark,
         regexp_replace(encode(textsend(concat_ws(', ', a.usename, nullif(a.application_name, ''),
                                                  host(a.client_addr))), 'escape'),
                        '[\u0001-\u001f\u007f]+', ' ', 'g') AS who,
         left(regexp_replace(left(q.text, 1000), '[\u0001-\u0020\u007f-\u009f]+', ' ', 'g'),
              200) AS query,
         q.text ~* '^\s*(/\*.*?\*/\s*|--[^\n]*\n\s*)*vacuum\y'
           OR a.pid IN (SELECT pid FROM pg_stat_progress_vacuum) AS vacuums,
         CASE WHEN a.backend_start IS NULL THEN 'what it does cannot be seen'
              WHEN a.datname IS DISTINCT FROM :'target'
                THEN concat('it works in another database, ',
                            regexp_replace(encode(textsend(a.datname::text), 'escape'),
                                           '[\u0001-\u001f\u007f]+', ' ', 'g'))
              WHEN a.backend_type <> 'client backend'
                THEN concat('it is a background process, ', a.backend_type)
              WHEN r.rolsuper IS DISTINCT FROM false AND current_setting('is_superuser') <> 'on'
                THEN 'it belongs to a superuser'
              WHEN NOT pg_has_role(r.oid, 'USAGE')
                   AND NOT pg_has_role('pg_signal_backend', 'USAGE')
                THEN 'it belongs to somebody else, and you are no member of pg_signal_backend'
         END AS untouchable
    FROM pg_stat_activity a LEFT JOIN pg_roles r ON r.oid = a.usesysid
    LEFT JOIN pg_database d ON d.oid = a.datid
    -- In a database of another encoding it is made of bytes that this one cannot read.
   CROSS JOIN LATERAL (
         SELECT CASE WHEN d.encoding = (SELECT encoding FROM pg_database
                                         WHERE datname = current_database())
                     THEN a.query ELSE encode(textsend(a.query), 'escape') END AS text) q),
-- A session that is still being let in waits too; it may not be among the sessions, or say where
-- it goes.
waiting AS MATERIALIZED (
  SELECT l.pid, l.object, l.mode, coalesce(l.since, s.query_start, '-infinity') AS since
    FROM lock l LEFT JOIN session s USING (pid)
   WHERE NOT l.granted AND l.locktype <> 'advisory'
     AND coalesce(s.backend_type, '') NOT LIKE 'autovacuum%'
     AND coalesce(s.datname = :'target',
                  l.database = (SELECT oid FROM pg_database WHERE datname = :'target'))),
waiter AS MATERIALIZED (
  SELECT pid, pg_blocking_pids(pid) AS blockers
    FROM (SELECT DISTINCT pid FROM waiting
           WHERE since <= clock_timestamp() - :wait * interval '1 second') w),
-- The table "Conflicting Lock Modes" of the manual.
conflict (held, wanted) AS (
  VALUES ('AccessShare', '{AccessExclusive}'::text[]),
         ('RowShare', '{Exclusive,AccessExclusive}'),
         ('RowExclusive', '{Share,ShareRowExclusive,Exclusive,AccessExclusive}'),
         ('ShareUpdateExclusive',
          '{ShareUpdateExclusive,Share,ShareRowExclusive,Exclusive,AccessExclusive}'),
         ('Share',
          '{RowExclusive,ShareUpdateExclusive,ShareRowExclusive,Exclusive,AccessExclusive}'),
         ('ShareRowExclusive', '{RowExclusive,ShareUpdateExclusive,Share,ShareRowExclusive,'
          'Exclusive,AccessExclusive}'),
         ('Exclusive', '{RowShare,RowExclusive,ShareUpdateExclusive,Share,ShareRowExclusive,'
          'Exclusive,AccessExclusive}'),
         ('AccessExclusive', '{AccessShare,RowShare,RowExclusive,ShareUpdateExclusive,Share,'
          'ShareRowExclusive,Exclusive,AccessExclusive}')),
-- Who waits for a lock that the other one has. Else it stands behind it in the queue.
hard AS MATERIALIZED (
  SELECT DISTINCT w.pid AS waiter, h.pid AS blocker
    FROM waiting w JOIN lock h ON h.object = w.object AND h.granted
    JOIN conflict c ON h.mode = c.held || 'Lock' AND replace(w.mode, 'Lock', '') = ANY (c.wanted)),
edge AS MATERIALIZED (
  SELECT DISTINCT w.pid AS waiter, b AS blocker,
         b IN (SELECT pid FROM waiting) AS blocker_waits,
         b IN (SELECT pid FROM waiting) AND hard.waiter IS NULL AS queue_only
    FROM waiter w CROSS JOIN LATERAL unnest(w.blockers) b
    LEFT JOIN hard ON hard.waiter = w.pid AND hard.blocker = b)
SQL
}

# Phase: activity

show_activity() {
    totals="
SELECT '@', 'total', count(*) FILTER (WHERE datname = :'target'), count(*),
       current_setting('max_connections'),
       count(*) FILTER (WHERE datname = :'target' AND state LIKE 'idle in transaction%'),
       coalesce(max(extract(epoch FROM clock_timestamp() - query_start)::bigint)
                FILTER (WHERE datname = :'target' AND state = 'active'), 0),
       (SELECT count(DISTINCT l.pid)
          FROM pg_locks l LEFT JOIN pg_stat_activity s USING (pid)
         WHERE NOT l.granted AND coalesce(s.datname = :'target',
               l.database = (SELECT oid FROM pg_database WHERE datname = :'target')))
  FROM pg_stat_activity
 WHERE datname IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
   AND pid <> pg_backend_pid()"
    sessions="
SELECT '@', 'session', s.pid, s.state, s.seconds, b.holds, w.blockers, s.who, s.query
  FROM session s
  LEFT JOIN (SELECT blocker AS pid, count(DISTINCT waiter) AS holds FROM edge GROUP BY 1) b
         USING (pid)
  LEFT JOIN (SELECT waiter AS pid, string_agg(DISTINCT blocker::text, ' ') AS blockers
               FROM edge GROUP BY 1) w USING (pid)
 WHERE s.pid <> pg_backend_pid()
   -- Who only waits is counted.
   AND (b.holds > 0 OR s.datname = :'target' AND w.pid IS NULL
                       AND (s.state = 'active' OR s.state LIKE 'idle in transaction%'))
 ORDER BY w.pid IS NULL DESC, b.holds DESC NULLS LAST, s.seconds DESC NULLS LAST, s.pid
 LIMIT 13"
    configured_wait=$wait
    wait=0
    ask 20 "$(transaction "$totals"; transaction "$(graph)$sessions")" ||
        fail "The sessions could not be looked at: $MESSAGES"
    wait=$configured_wait
    shown=0
    for_each_row activity_row
}

activity_row() {
    if [ "$1" = total ]; then
        say "   sessions: $2 here, $3 on the whole server (at most $4)"
        say "   waiting for a lock: $7; idle in transaction: $5; longest query: $6 s"
        return
    fi
    shown=$((shown + 1))
    if [ "$shown" -eq 13 ]; then
        say "   and more"
        return
    fi
    line="$2  $3"
    [ "$3" = hidden ] || line="$line for $4 s"
    [ -z "$5" ] || line="$line, holds up $5"
    [ -z "$6" ] || line="$line, waits for $(prepared_named "$6")"
    say "   $line ($7)"
    [ -z "${8-}" ] || say "        $8"
}

# Zero stands for a prepared transaction, which has no process.
prepared_named() {
    case $1 in
        0) say "a prepared transaction" ;;
        "0 "*) say "${1#0 } and a prepared transaction" ;;
        *) say "$1" ;;
    esac
}

# Phase: sessions

# Sets CANCEL and TERMINATE, lists of pid:mark, and the variables about_PID.
plan() {
    CANCEL=''
    TERMINATE=''
    decide="
, queued AS (
  SELECT DISTINCT e.blocker AS pid
    FROM edge e JOIN session s ON s.pid = e.blocker AND s.untouchable IS NULL
   WHERE e.waiter IN (SELECT waiter FROM edge GROUP BY waiter HAVING bool_and(queue_only))),
target AS (
  SELECT pid, 'queued' AS why FROM queued
   UNION
  SELECT e.blocker, 'holds' FROM edge e
   WHERE NOT e.blocker_waits AND e.waiter NOT IN (SELECT pid FROM queued)
   UNION
  SELECT pid, 'long' FROM session
   WHERE state = 'active' AND seconds > :long AND NOT vacuums
     AND datname = :'target' AND backend_type = 'client backend'
     AND pid NOT IN (SELECT pid FROM lock WHERE NOT granted AND pid IS NOT NULL)
     AND pid NOT IN (SELECT blocker FROM edge)),
held (pid, number) AS (SELECT blocker, count(DISTINCT waiter) FROM edge GROUP BY 1)
SELECT '@', 'session',
       CASE WHEN s.untouchable IS NOT NULL OR t.why = 'holds' AND s.vacuums THEN 'leave'
            WHEN s.state LIKE 'idle in transaction%' THEN 'terminate' ELSE 'cancel' END,
       s.pid, s.mark, t.why, s.state, s.seconds, h.number, s.who,
       coalesce(s.untouchable, 'it is a VACUUM'), s.query
  FROM target t JOIN session s USING (pid) LEFT JOIN held h USING (pid)
 WHERE s.state <> 'idle' AND s.pid <> pg_backend_pid()
   -- Whoever began later than that cannot be what the others have waited for all the time; and who
   -- was let go just now is given a while to commit.
   AND (t.why = 'long'
        OR coalesce(s.xact_start, '-infinity') <= clock_timestamp() - :wait * interval '1 second'
           AND (s.state = 'active'
                OR coalesce(s.state_change, '-infinity')
                   <= clock_timestamp() - :wait * interval '1 second'
                OR s.xact_start <= clock_timestamp() - :long * interval '1 second'))
 UNION ALL
SELECT '@', 'prepared',
       -- A name may hold anything: what looks like another row, or bytes of another encoding.
       quote_literal(regexp_replace(
           CASE WHEN d.encoding = (SELECT encoding FROM pg_database
                                    WHERE datname = current_database())
                THEN p.gid ELSE encode(textsend(p.gid), 'escape') END,
           '[\u0001-\u001f\u007f]', ' ', 'g')),
       NULL, NULL, NULL, NULL,
       extract(epoch FROM clock_timestamp() - p.prepared)::bigint, NULL,
       regexp_replace(encode(textsend(p.owner::text), 'escape'),
                      '[\u0001-\u001f\u007f]+', ' ', 'g'), NULL, NULL
  FROM pg_prepared_xacts p JOIN pg_database d ON d.datname = p.database
 WHERE p.database = :'target' AND EXISTS (SELECT FROM edge WHERE blocker = 0)
 ORDER BY 2, 9 DESC NULLS LAST"
    locked="
SELECT DISTINCT '@', 'table', l.relation
  FROM pg_locks l
 WHERE l.relation >= 16384 AND (NOT l.granted OR l.locktype = 'tuple')
   AND l.pid IN (SELECT pid FROM pg_locks WHERE NOT granted)
   AND l.database = (SELECT oid FROM pg_database WHERE datname = :'target')"
    ask 20 "$(transaction "$locked"; transaction "$(graph)$decide")" || return 1
    for_each_row planned_row
}

planned_row() {
    case $1 in
        table)
            case ",$affected," in *",$2,"*) ;; *) affected="${affected:+$affected,}$2" ;; esac
            ;;
        prepared)
            case $reported in *" $2 "*) return ;; esac
            reported="$reported $2 "
            fail "A prepared transaction of ${9} holds others up since $7 s. Type one of:" \
                "COMMIT PREPARED $2;  ROLLBACK PREPARED $2;"
            ;;
        session)
            # It becomes part of a variable's name.
            case $3 in '' | *[!0-9]*) return ;; esac
            about="$6 for $7 s"
            case $5 in
                queued) about="$about, queued with others behind it" ;;
                holds) about="$about, held up $8" ;;
            esac
            about="$about ($9)$newline        ${11-}"
            plan_session "$2" "$3" "$4" "$5" "${10}"
            ;;
    esac
}

# Action, pid, mark, why, and the reason for leaving it alone.
plan_session() {
    eval "about_$2=\$about"
    case $1 in
        leave)
            case $reported in *" $2 "*) return ;; esac
            reported="$reported $2 "
            if [ "$4" = holds ]; then
                fail "$2 holds others up, but $5. If it must end, somebody who may:" \
                    "SELECT pg_terminate_backend($2);"
            else
                say "   $2 left alone: $5"
            fi
            say "        $about"
            ;;
        cancel)
            # It was cancelled before, and stands in the way again.
            case $cancelled in
                *" $2:${3%%/*} "*) TERMINATE="$TERMINATE $2:$3" ;;
                *) CANCEL="$CANCEL $2:$3" ;;
            esac
            ;;
        terminate) TERMINATE="$TERMINATE $2:$3" ;;
    esac
}

# Whether a session is still the one that was planned for, and at the same thing.
same_session() {
    printf '%s\n' "a.pid = ${1%%:*} AND a.pid <> pg_backend_pid()
        AND a.backend_type = 'client backend' AND a.datname = :'target'
        AND concat_ws('/', to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                           to_char(a.query_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                           to_char(a.xact_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS'),
                           replace(a.state, ' ', '_')) = '${1#*:}'"
}

# Cancels or terminates all of a list of pid:mark, each by itself; who has changed is left alone.
# Then waits for up to 5 seconds, and sets LEFT to those who are still at it.
end_all() {
    verb=$1
    LEFT=$2
    [ -n "$2" ] || return 0
    orders=''
    for target_session in $2; do
        orders="$orders$newline$(transaction "SELECT '@', ${target_session%%:*}, (
            SELECT pg_${verb}_backend(a.pid) FROM pg_stat_activity a
             WHERE $(same_session "$target_session"))")"
        [ "$verb" = terminate ] || cancelled="$cancelled ${target_session%%/*} "
    done
    answered=' '
    stop_at_errors=0
    ask 30 "$orders"
    stop_at_errors=1
    for_each_row ended_row
    for target_session in $2; do
        case $answered in
            *" ${target_session%%:*} "*) ;;
            *) fail "${target_session%%:*} could not be reached: $MESSAGES" ;;
        esac
    done
    for _ in 1 2 3 4 5; do
        still_there "$verb" || return 0
        [ -n "$LEFT" ] || return 0
        sleep 1
    done
}

ended_row() {
    answered="$answered$1 "
    eval "about=\$about_$1"
    case $verb:${2-} in
        cancel:t) say "   $1 cancelled: $about" ;;
        terminate:t) say "   $1 terminated: $about" ;;
        *:f) fail "$1 could not be signalled" ;;
        *) say "   $1 left alone: it has ended or does something else by now" ;;
    esac
}

# Sets LEFT to those of it who are still there: the same query, or when terminated the same session.
still_there() {
    condition=''
    for target_session in $LEFT; do
        if [ "$1" = cancel ]; then
            same=$(same_session "$target_session")
        else
            begun=${target_session#*:}
            same="a.pid = ${target_session%%:*}
                AND to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS') = '${begun%%/*}'"
        fi
        condition="$condition${condition:+ OR }$same"
    done
    ask 20 "$(transaction "SELECT '@', a.pid FROM pg_stat_activity a WHERE $condition")" || return 1
    pids=" $(printf '%s' "$ROWS" | tr '\n' ' ') "
    candidates=$LEFT
    LEFT=''
    for target_session in $candidates; do
        case $pids in *" ${target_session%%:*} "*) LEFT="$LEFT $target_session" ;; esac
    done
}

# Who is freed by one step may be held up by the next one: so look again, a few times.
end_sessions() {
    cancelled=' '
    reported=' '
    ended=no
    configured_long=$long
    for _ in 1 2 3 4; do
        if ! plan; then
            fail "It could not be found out who holds others up: $MESSAGES"
            break
        fi
        [ -n "$CANCEL$TERMINATE" ] || break
        ended=yes
        if [ -n "$dry_run" ]; then
            for target_session in $CANCEL $TERMINATE; do
                would "$target_session"
            done
            break
        fi
        terminate=$TERMINATE
        end_all cancel "$CANCEL"
        end_all terminate "$terminate $LEFT"
        for target_session in $LEFT; do
            fail "${target_session%%:*} does not end, though it was terminated. Never kill -9 it:" \
                "that restarts every session."
        done
        # Queries that are long by now were only held up.
        long=999999999
    done
    long=$configured_long
    [ "$ended" = yes ] || say "   nothing to end"
}

would() {
    case " $TERMINATE " in
        *" $1 "*) verb=terminated ;;
        *) verb=cancelled ;;
    esac
    eval "about=\$about_${1%%:*}"
    say "   ${1%%:*} would be $verb: $about"
}

# Phase: writers

# Whether one of the writers is what a command runs, given one word a line: it itself, or the script
# or module that its interpreter runs. Its name among the arguments of anything else means nothing.
runs_a_writer() {
    writers="$writers" awk '
    function stem(path) {
        sub(/\/(__main__\.py)?$/, "", path)
        sub(/^.*\//, "", path)
        sub(/\.(py|pyw|pyc|sh|bash|ksh|zsh|pl|rb|js|mjs|cjs)$/, "", path)
        return alike(path)
    }
    function module(name) {
        sub(/\.__main__$/, "", name)
        sub(/^.*\./, "", name)
        return alike(name)
    }
    # An installed script morning-brief starts the module morning_brief.
    function alike(name) {
        gsub(/-/, "_", name)
        return name
    }
    # The script or module that Python runs.
    function of_python(    i, j, option) {
        for (i = 2; i <= NR; i++) {
            if (word[i] !~ /^-./) return stem(word[i])
            if (word[i] == "--check-hash-based-pycs") i++
            if (word[i] ~ /^--/) continue
            for (j = 2; j <= length(word[i]); j++) {
                option = substr(word[i], j, 1)
                if (option == "c") return ""
                if (option == "m")
                    return module(j < length(word[i]) ? substr(word[i], j + 1) : word[i + 1])
                if (option ~ /[WXQ]/) {
                    if (j == length(word[i])) i++
                    break
                }
            }
        }
        return ""
    }
    function of_shell(    i) {
        for (i = 2; i <= NR; i++) {
            if (word[i] !~ /^[-+]./) return stem(word[i])
            if (word[i] ~ /^-[a-zA-Z]*[cs]/) return ""
            if (word[i] ~ /^[-+][a-zA-Z]*[oO]$/ || word[i] ~ /^--(rc|init-)file$/) i++
        }
        return ""
    }
    function of_another(    i) {
        for (i = 2; i <= NR; i++) {
            if (word[i] !~ /^-./) return stem(word[i])
            if (word[i] ~ /^-(e|p|c|-eval|-print)/) return ""
            if (word[i] ~ /^(-r|--require|--import|--loader|-I)$/) i++
        }
        return ""
    }
    { word[NR] = $0 }
    END {
        count = split(ENVIRON["writers"], names, /[ ,]+/)
        for (i = 1; i <= count; i++) if (names[i] != "") wanted[alike(names[i])] = 1
        # A login shell has a dash before its name.
        sub(/^-/, "", word[1])
        program = stem(word[1])
        if (!(program in wanted)) {
            lower = tolower(program)
            if (lower ~ /^(python|pypy)w?[0-9.]*(t|d|dm|_dbg)?$/) program = of_python()
            else if (lower ~ /^(ba|da|a|k|mk|z|ya)?sh[0-9]*$/) program = of_shell()
            else if (lower ~ /^(node|nodejs|perl|ruby)[0-9.]*$/) program = of_another()
        }
        exit !(program in wanted)
    }'
}

# Sets FOUND to the pids of this user's writers, and the variables command_PID.
find_writers() {
    FOUND=''
    # BSD cuts the lines to the terminal without -ww, busybox does not know it.
    processes=$(ps -A -ww -o pid= -o user= -o args= 2>/dev/null) ||
        processes=$(ps -A -o pid= -o user= -o args= 2>/dev/null) || return 1
    me=$(id -un 2>/dev/null)
    # A first choice: names that are nowhere on the line.
    candidates=$(
        printf '%s\n' "$processes" | writers="$writers" me="$me" number="$(id -u)" awk '
        BEGIN {
            text = ENVIRON["writers"]
            gsub(/-/, "_", text)
            count = split(text, names, /[ ,]+/)
        }
        {
            text = $0
            gsub(/-/, "_", text)
            mine = $2 == ENVIRON["me"] || $2 == ENVIRON["number"]
            # A long name is cut short.
            if ($2 ~ /.\+$/) mine = index(ENVIRON["me"], substr($2, 1, length($2) - 1)) == 1
            if (mine) for (i = 1; i <= count; i++) if (names[i] != "" && index(text, names[i])) {
                print
                next
            }
        }'
    )
    IFS=$newline
    for line in $candidates; do
        IFS=$default_separators
        # shellcheck disable=SC2086 # It is to be split.
        set -- $line
        pid=$1
        # It becomes part of a variable's name.
        case $pid in '' | *[!0-9]*) continue ;; esac
        shift 2
        command_line=$*
        if [ "$pid" -ne $$ ] && words_of "$pid" "$command_line" | runs_a_writer; then
            FOUND="$FOUND $pid"
            command_line=$(printf '%s' "$command_line" | tr '\001-\037\177' ' ')
            eval "command_$pid=\$command_line"
        fi
    done
    IFS=$default_separators
}

# The words of a command, one a line; exactly where Linux tells them, else split at blanks.
words_of() {
    if [ -r "/proc/$1/cmdline" ]; then
        tr '\012\000' '\040\012' <"/proc/$1/cmdline" 2>/dev/null
    else
        printf '%s\n' "$2" | tr -s ' ' '\n'
    fi
}

# Waits up to so many seconds for processes to end, and sets LEFT to those that have not.
wait_for_end() {
    seconds=$1
    shift
    while :; do
        find_writers
        LEFT=''
        for pid in "$@"; do
            case " $FOUND " in *" $pid "*) LEFT="$LEFT $pid" ;; esac
        done
        [ -n "$LEFT" ] && [ "$seconds" -gt 0 ] || return 0
        seconds=$((seconds - 1))
        sleep 1
    done
}

send() {
    signal=$1
    shift
    for pid in "$@"; do
        eval "command_line=\$command_$pid"
        if kill -s "$signal" "$pid" 2>/dev/null; then
            say "   $pid sent $signal: $command_line"
        else
            say "   $pid has just ended: $command_line"
        fi
    done
}

stop_writers() {
    if ! find_writers; then
        fail "The processes cannot be listed (is ps installed?), so no writer was stopped."
        return
    fi
    if [ -z "$FOUND" ]; then
        say "   none is running (looked for $writers)"
        return
    fi
    if [ -n "$dry_run" ]; then
        for pid in $FOUND; do
            eval "say \"   \$pid would be stopped: \$command_$pid\""
        done
        return
    fi
    targets=$FOUND
    stopped=yes
    # shellcheck disable=SC2086 # These are lists.
    {
        send TERM $targets
        wait_for_end 5 $targets
        if [ -n "$LEFT" ]; then
            send KILL $LEFT
            wait_for_end 5 $LEFT
        fi
    }
    for pid in $LEFT; do
        fail "The process $pid does not end."
    done
    look_for_successors
}

look_for_successors() {
    sleep 2
    find_writers
    successors=''
    for pid in $FOUND; do
        case " $targets " in *" $pid "*) ;; *) successors="$successors $pid" ;; esac
    done
    if [ -n "$successors" ]; then
        fail "Something starts the writers again (now$successors): run helena stop-realtime."
    else
        say "   A supervisor or cron may start them again: run helena stop-realtime to keep them stopped."
    fi
}

# Phase: gin

empty_pending_lists() {
    question="
SELECT '@', i.oid, regexp_replace(i.oid::regclass::text, '[\u0001-\u001f\u007f-\u009f]', ' ', 'g'),
       pg_has_role(i.relowner, 'USAGE')
  FROM pg_index x
  JOIN pg_class i ON i.oid = x.indexrelid AND i.relkind = 'i' AND i.relpersistence <> 't'
  JOIN pg_am a ON a.oid = i.relam AND a.amname = 'gin'
  CROSS JOIN LATERAL (SELECT x.indrelid IN ($(known_tables)) AS known) k
 WHERE x.indisvalid AND x.indisready AND (k.known OR pg_has_role(i.relowner, 'USAGE'))
 ORDER BY k.known DESC, i.relpages DESC"
    if ! ask 20 "$(transaction "$question")"; then
        fail "The GIN indexes could not be listed: $MESSAGES"
        return
    fi
    [ -n "$ROWS" ] || say "   there is no GIN index that is yours"
    empty=0
    for_each_row empty_one
    [ "$empty" -eq 0 ] || say "   indexes with an empty list: $empty"
}

# What PostgreSQL says when one of the limits above has ended a step, in plain words.
in_words() {
    case $1 in
        *"lock timeout"*) say "somebody has it locked" ;;
        *"statement timeout"*) say "it took too long; run this again" ;;
        *) say "$1" ;;
    esac
}

# The oids of Helena's tables, those that are named, and those that were waited for.
known_tables() {
    printf '%s\n' "SELECT to_regclass(n)::oid FROM unnest(string_to_array(:'names', ',')) n
                     WHERE to_regclass(n) IS NOT NULL
                     UNION SELECT o::oid FROM unnest(string_to_array(:'oids', ',')) o"
}

empty_one() {
    if [ "$3" != t ]; then
        fail "$2: its pending list can be emptied by its owner only"
    elif [ -n "$dry_run" ]; then
        say "   $2 would be emptied"
    elif ask 70 "$(transaction "SELECT '@', gin_clean_pending_list($1::oid::regclass)" 60s)"; then
        if [ "$ROWS" = 0 ]; then
            empty=$((empty + 1))
        else
            say "   $2: $(many "$ROWS" page)"
        fi
    else
        fail "$2: $(in_words "$MESSAGES")"
    fi
}

# Phase: vacuum

vacuum_tables() {
    question="
SELECT '@', c.oid, regexp_replace(c.oid::regclass::text, '[\u0001-\u001f\u007f-\u009f]', ' ', 'g'),
       pg_has_role(c.relowner, 'USAGE')
         OR pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), 'USAGE')
         OR CASE WHEN current_setting('server_version_num')::int >= 170000
                 THEN has_table_privilege(c.oid, 'MAINTAIN') ELSE false END,
       EXISTS (SELECT FROM pg_stat_progress_vacuum v
                WHERE v.relid = c.oid AND v.datname = current_database())
  FROM pg_class c
 WHERE c.oid IN ($(known_tables)) AND c.relkind IN ('r', 'm', 'p') AND c.relpersistence <> 't'
 ORDER BY 3"
    if ! ask 20 "$(transaction "$question")"; then
        fail "The tables could not be listed: $MESSAGES"
        return
    fi
    [ -n "$ROWS" ] || say "   none of these tables is here: $tables"
    pooled=''
    for_each_row vacuum_one
}

vacuum_one() {
    if [ -n "$pooled" ]; then
        return
    elif [ "$4" = t ]; then
        say "   $2: another VACUUM is at work on it"
    elif [ "$3" != t ]; then
        fail "$2: VACUUM is up to its owner"
    elif [ -n "$dry_run" ]; then
        say "   $2 would be vacuumed"
    else
        run_vacuum "$1" "$2"
    fi
}

# VACUUM runs in no transaction, so its limits go with the connection. A pooler refuses or forgets
# those; then there is no VACUUM.
run_vacuum() {
    dead="SELECT '@', n_dead_tup FROM pg_stat_user_tables WHERE relid = $1;"
    began=$(date +%s)
    options=${PGOPTIONS-}
    PGOPTIONS="$options -c lock_timeout=500ms -c statement_timeout=${vacuum_limit}s"
    export PGOPTIONS
    ask "$((vacuum_limit + 20))" "
SELECT current_setting('lock_timeout') = '500ms' AS limited \\gset
\\if :limited
$dead
SELECT format('VACUUM (ANALYZE) %s', oid::regclass) FROM pg_class WHERE oid = $1 \\gexec
$dead
\\else
SELECT '@', 'unlimited';
\\endif"
    code=$?
    PGOPTIONS=$options
    case $ROWS:$MESSAGES in
        unlimited:* | *"startup parameter"*)
            pooled=yes
            fail "No VACUUM through a pooler; set HELENA_DATABASE_DIRECT_DSN to PostgreSQL itself."
            return
            ;;
    esac
    # What VACUUM passes over, it only warns of.
    if [ "$code" -ne 0 ] || [ -n "$MESSAGES" ]; then
        fail "$2: $(in_words "$MESSAGES")"
        return
    fi
    # shellcheck disable=SC2086 # Two numbers, or none for a partitioned table.
    set -- "$2" $ROWS
    # Before PostgreSQL 15 the second number may be out of date.
    if [ "${2:-0}" -gt "${3:-0}" ]; then
        say "   $1: done in $(($(date +%s) - began)) s, dead rows $2 before, $3 now"
    else
        say "   $1: done in $(($(date +%s) - began)) s"
    fi
}

# Phase: result

show_result() {
    show_activity
    if ask 20 "$(transaction "$(graph) SELECT '@', count(*) FROM waiter")"; then
        [ "$ROWS" = 0 ] || fail "Held up for more than $wait s: $(many "$ROWS" session). Run this" \
            "again, or see above who holds them up."
    fi
}

# All of it

read_arguments() {
    phases=''
    dry_run=''
    for argument in "$@"; do
        case $argument in
            -h | --help)
                usage
                exit 0
                ;;
            -n | --dry-run) dry_run=yes ;;
            activity | sessions | writers | gin | vacuum | result) phases="$phases $argument" ;;
            *) give_up 2 "$argument is neither an option nor a phase; see --help." ;;
        esac
    done
    phases=${phases:-activity sessions writers gin vacuum result}
}

read_variables() {
    long=${HELENA_EMERGENCY_SECONDS:-300}
    wait=${HELENA_EMERGENCY_WAIT:-10}
    vacuum_limit=${HELENA_EMERGENCY_VACUUM_SECONDS:-600}
    for number in "$long" "$wait" "$vacuum_limit"; do
        case $number in
            *[!0-9]* | ??????????*) give_up 3 "HELENA_EMERGENCY_...=$number is not a number of seconds." ;;
        esac
    done
    writers=${HELENA_REALTIME_PROCESSES:-helena_realtime_processor,realtime_md_watcher,morning_brief}
    tables=es_document_references,es_document_usage_log,messages,agent_contexts,documents
    tables=$tables${HELENA_EMERGENCY_TABLES:+,$HELENA_EMERGENCY_TABLES}
    affected=''
    failures=''
    greeted=''
    stopped=''
    target=''
    PGCLIENTENCODING=SQL_ASCII
    export PGCLIENTENCODING
}

needs_database() {
    for name in $phases; do
        [ "$name" = writers ] || return 0
    done
    return 1
}

look_and_free() {
    if wants activity; then
        phase "What is going on"
        show_activity
    fi
    if wants sessions; then
        phase "Ending what holds others up, or runs for more than $long s"
        end_sessions
    fi
}

clean_up() {
    # By now it may let us in.
    if [ "$REACHED" = server ]; then
        connect || REACHED=''
    fi
    if [ "$REACHED" != target ]; then
        fail "The database $target lets nobody in, so no GIN index and no table was cleaned: $problem"
    elif [ "$in_recovery" = t ]; then
        say "   The server is a standby: GIN indexes and tables are cleaned on its primary."
    else
        if wants gin; then
            phase "Emptying the pending lists of GIN indexes"
            empty_pending_lists
        fi
        if wants vacuum; then
            phase "VACUUM (ANALYZE)"
            vacuum_tables
        fi
    fi
}

finish() {
    if [ -n "$failures" ]; then
        printf '\n%s\n%s' "Not done:" "$failures"
        exit 1
    fi
    if [ -n "$dry_run" ]; then
        phase "Nothing was changed (--dry-run)."
    else
        phase "Everything was done."
    fi
    exit 0
}

main() {
    read_arguments "$@"
    read_variables
    read_dsn
    REACHED=''
    if needs_database; then
        command -v psql >/dev/null || give_up 3 "psql is not installed (package postgresql-client)."
        if connect; then
            look_and_free
        else
            phase "The database cannot be reached: ${problem:-$MESSAGES}"
        fi
    fi
    if wants writers; then
        phase "Stopping the real-time writers"
        stop_writers
    fi
    if needs_database; then
        if [ -z "$REACHED" ]; then
            # The writers may have had all the connections.
            if [ -z "$stopped" ] || ! connect; then
                unreachable
            fi
            look_and_free
        fi
        if wants gin || wants vacuum; then
            clean_up
        fi
        if wants result && [ -z "$dry_run" ]; then
            phase "What is left"
            show_result
        fi
    fi
    finish
}

unreachable() {
    [ -z "$failures" ] || printf '\n%s\n%s' "Not done:" "$failures"
    phase "Nothing was done in the database: $problem"
    say "Check the address (from $SOURCE), whether the server runs, and its log. If it has no free" \
        "connection, connect as a superuser: a few are kept for them."
    exit 4
}

trap 'exit 130' INT
trap 'exit 143' TERM HUP
main "$@"
