"""Tables of the run database, and opening it safely.

Wall-clock columns (``*_at``, seconds since the epoch) are for people; no decision reads them. Integers that
may exceed 63 bits (pack seeds) are text. Payloads live in a table of their own so that scanning segments
never drags token bytes through the cache.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from cod_async.errors import StoreError

SCHEMA_VERSION = 3
DATABASE_NAME = "run.sqlite"
"""File name of the database inside a run folder."""

PAGE_BYTES = 32768
WAL_BYTES = 64 << 20
"""The write-ahead log is copied into the database whenever it has grown to this size."""

_NETWORK_FILESYSTEMS = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "ncpfs",
            "afs",
            "lustre",
            "gpfs",
            "beegfs",
            "ceph",
            "panfs",
        ),
        *(
            "fuse.sshfs",
            "fuse.ceph",
            "fuse.ceph-fuse",
            "fuse.glusterfs",
            "glusterfs",
            "fuse.s3fs",
            "fuse.gcsfuse",
        ),
    }
)

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    session INTEGER PRIMARY KEY,
    role TEXT NOT NULL, name TEXT NOT NULL, instance INTEGER NOT NULL, pid INTEGER NOT NULL, host TEXT NOT
    NULL, state TEXT NOT NULL CHECK (state IN ('live', 'ended', 'lost')), reason TEXT NOT NULL DEFAULT '',
    counters TEXT NOT NULL DEFAULT '{}', started_at REAL NOT NULL, ended_at REAL
) STRICT;
CREATE INDEX sessions_live ON sessions (role, name) WHERE state = 'live';

CREATE TABLE lineages (
    lineage INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES lineages (lineage),
    branch_step INTEGER NOT NULL,
    nonce TEXT NOT NULL UNIQUE,
    num_rolled_back INTEGER NOT NULL,
    opened_at REAL NOT NULL
) STRICT;

CREATE TABLE versions (
    lineage INTEGER NOT NULL REFERENCES lineages (lineage),
    step INTEGER NOT NULL,
    digest TEXT NOT NULL,
    manifest TEXT NOT NULL,
    published_at REAL NOT NULL,
    PRIMARY KEY (lineage, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoints (
    lineage INTEGER NOT NULL REFERENCES lineages (lineage),
    step INTEGER NOT NULL,
    path TEXT NOT NULL, digest TEXT NOT NULL, trained_digest TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (lineage, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE groups (
    grp INTEGER PRIMARY KEY,
    environment TEXT NOT NULL, preset TEXT NOT NULL, options_json TEXT NOT NULL, records_json TEXT NOT NULL,
    pack_seed TEXT NOT NULL, pack_size INTEGER NOT NULL,
    planned_lineage INTEGER NOT NULL, planned_step INTEGER NOT NULL,
    floor_lineage INTEGER, floor_step INTEGER,
    baselines TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL CHECK (state IN ('open', 'closed', 'planned', 'trained', 'dropped')),
    reason TEXT NOT NULL DEFAULT '',
    CHECK ((floor_lineage IS NULL) = (floor_step IS NULL))
) STRICT;
CREATE INDEX groups_untrained ON groups (grp) WHERE state IN ('open', 'closed', 'planned');

CREATE TABLE leases (
    grp INTEGER NOT NULL REFERENCES groups (grp),
    member INTEGER NOT NULL,
    lease_epoch INTEGER NOT NULL,
    session INTEGER REFERENCES sessions (session),
    state TEXT NOT NULL CHECK (state IN ('free', 'held', 'ended', 'given_up')),
    next_ordinal INTEGER NOT NULL,
    num_retries INTEGER NOT NULL, num_takeovers INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    granted_at REAL, settled_at REAL,
    PRIMARY KEY (grp, member),
    CHECK ((state = 'held') <= (session IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_free ON leases (grp, member) WHERE state = 'free';
CREATE INDEX leases_held ON leases (session) WHERE state = 'held';

CREATE TABLE lease_epochs (
    grp INTEGER NOT NULL, member INTEGER NOT NULL, lease_epoch INTEGER NOT NULL,
    session INTEGER NOT NULL REFERENCES sessions (session),
    request INTEGER NOT NULL,
    min_lineage INTEGER NOT NULL, min_step INTEGER NOT NULL,
    granted_at REAL NOT NULL,
    PRIMARY KEY (grp, member, lease_epoch)
) STRICT, WITHOUT ROWID;

CREATE INDEX lease_epochs_request ON lease_epochs (session, request);

CREATE TABLE payloads (payload INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;

CREATE TABLE segments (
    grp INTEGER NOT NULL REFERENCES groups (grp),
    member INTEGER NOT NULL,
    ordinal INTEGER NOT NULL,
    lease_epoch INTEGER NOT NULL,
    session INTEGER NOT NULL REFERENCES sessions (session),
    actor TEXT NOT NULL,
    kind TEXT NOT NULL, position INTEGER NOT NULL,
    reward REAL NOT NULL, raw_reward REAL NOT NULL, finish TEXT NOT NULL, is_last INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, num_action_tokens INTEGER NOT NULL,
    oldest_lineage INTEGER NOT NULL, oldest_step INTEGER NOT NULL,
    newest_lineage INTEGER NOT NULL, newest_step INTEGER NOT NULL,
    version_tokens TEXT NOT NULL,
    return_value REAL, baseline REAL, advantage REAL, is_late INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'ready', 'planned', 'trained', 'dropped')),
    trained_lineage INTEGER, trained_step INTEGER,
    drop_reason TEXT NOT NULL DEFAULT '',
    payload INTEGER REFERENCES payloads (payload),
    received_at REAL NOT NULL,
    PRIMARY KEY (grp, member, ordinal),
    CHECK ((state = 'dropped') = (drop_reason <> '')),
    CHECK ((state = 'trained') = (trained_step IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX segments_trained ON segments (trained_lineage, trained_step) WHERE state = 'trained';
CREATE INDEX segments_late ON segments (grp, member, ordinal) WHERE state = 'ready' AND is_late = 1;
CREATE INDEX segments_payload ON segments (payload) WHERE payload IS NOT NULL;

CREATE TABLE refused_segments (
    grp INTEGER NOT NULL, member INTEGER NOT NULL, ordinal INTEGER NOT NULL, lease_epoch INTEGER NOT NULL,
    session INTEGER NOT NULL REFERENCES sessions (session),
    reason TEXT NOT NULL, detail TEXT NOT NULL,
    num_action_tokens INTEGER NOT NULL,
    received_at REAL NOT NULL,
    PRIMARY KEY (grp, member, ordinal, lease_epoch)
) STRICT, WITHOUT ROWID;

CREATE TABLE steps (
    lineage INTEGER NOT NULL REFERENCES lineages (lineage),
    step INTEGER NOT NULL,
    plan_digest TEXT NOT NULL,
    trained_digest TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('planned', 'done', 'rolled_back')),
    report TEXT NOT NULL,
    is_reported INTEGER NOT NULL DEFAULT 0,
    done_at REAL,
    PRIMARY KEY (lineage, step)
) STRICT, WITHOUT ROWID;
CREATE INDEX steps_unreported ON steps (lineage, step) WHERE state = 'done' AND is_reported = 0;

CREATE TABLE dropped_plans (
    lineage INTEGER NOT NULL REFERENCES lineages (lineage),
    step INTEGER NOT NULL,
    plan_digest TEXT NOT NULL,
    reason TEXT NOT NULL,
    num_segments INTEGER NOT NULL, num_action_tokens INTEGER NOT NULL,
    dropped_at REAL NOT NULL,
    PRIMARY KEY (lineage, step, plan_digest)
) STRICT, WITHOUT ROWID;

CREATE TABLE step_items (
    lineage INTEGER NOT NULL, step INTEGER NOT NULL,
    grp INTEGER NOT NULL, member INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    lease_epoch INTEGER NOT NULL, advantage REAL NOT NULL, lag_steps INTEGER NOT NULL,
    PRIMARY KEY (lineage, step, grp, member, ordinal),
    FOREIGN KEY (lineage, step) REFERENCES steps (lineage, step),
    FOREIGN KEY (grp, member, ordinal) REFERENCES segments (grp, member, ordinal)
) STRICT, WITHOUT ROWID;
CREATE INDEX step_items_segment ON step_items (grp, member, ordinal);

CREATE TABLE step_replays (
    lineage INTEGER NOT NULL, step INTEGER NOT NULL,
    grp INTEGER NOT NULL, member INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    lease_epoch INTEGER NOT NULL, advantage REAL NOT NULL, lag_steps INTEGER NOT NULL,
    PRIMARY KEY (lineage, step, grp, member, ordinal),
    FOREIGN KEY (lineage, step) REFERENCES steps (lineage, step),
    FOREIGN KEY (grp, member, ordinal) REFERENCES segments (grp, member, ordinal)
) STRICT, WITHOUT ROWID;
CREATE INDEX step_replays_segment ON step_replays (grp, member, ordinal);
"""


def filesystem_kind(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the type of the filesystem that holds ``path``, or None where the system does not say."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return None
    resolved = path.resolve()
    best: tuple[int, str] | None = None
    for line in lines:
        left, separator, right = line.partition(" - ")
        fields = left.split(" ")
        if not separator or len(fields) < 5:
            continue
        mount = Path(fields[4].replace("\\040", " "))
        if (mount == resolved or mount in resolved.parents) and (best is None or len(mount.parts) >= best[0]):
            best = (len(mount.parts), right.split(" ")[0])
    return None if best is None else best[1]


def refuse_network_filesystem(folder: Path) -> None:
    """Check that SQLite's locks and flushes can be trusted here.

    Raises:
        StoreError: the folder lies on a network filesystem.
    """
    kind = filesystem_kind(folder)
    if kind in _NETWORK_FILESYSTEMS:
        raise StoreError(
            f"{folder} is on a network filesystem ({kind}), where SQLite can corrupt the run database; "
            "set run.output_dir to a folder on a local disk of the coordinator"
        )


def connect_writer(path: Path) -> sqlite3.Connection:
    """Open the database for its one writer, creating the tables in a new file.

    Raises:
        StoreError: not a database of this schema version, damaged, or not writable.
    """
    refuse_network_filesystem(path.parent)
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=10.0, check_same_thread=False)
        # Large pages: a segment of 16 kB is one write, not a chain of overflow pages. For new files only.
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_BYTES // PAGE_BYTES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            version = SCHEMA_VERSION
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be opened as a run database ({error})") from error
    _check_version(path, version)
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Open the database read-only. Keep transactions short: a long one makes the write-ahead log grow.

    Args:
        path: the database file, or the run folder that holds it.

    Raises:
        StoreError: no database there, or one of another schema version.
    """
    file = path / DATABASE_NAME if path.is_dir() else path
    if not file.is_file():
        raise StoreError(f"{file}: no run database; give the folder of a run that was started")
    try:
        connection = sqlite3.connect(
            f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10.0
        )
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error as error:
        raise StoreError(f"{file}: cannot be read as a run database ({error})") from error
    _check_version(file, version)
    return connection


def _check_version(path: Path, version: int) -> None:
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema version {version}, this program knows {SCHEMA_VERSION}; use the cod-async that "
            f"wrote it"
        )
