"""The journal's queries. Each runs on an open connection, inside the caller's transaction."""

import json
import sqlite3
from collections.abc import Iterable

from sona.journal import codec
from sona.journal.records import (
    Choice,
    FeedbackRecord,
    FeedbackState,
    PatternFeedback,
    Positions,
    RequestRecord,
)

_REQUEST = (
    "tenant, principal, request_id, model, base_hash, created, prompt_ids, prompt_text, "
    "prompt_vector, choices, adapter_versions"
)
_FEEDBACK = (
    "seq, tenant, principal, feedback_id, request_id, choice_index, kind, payload, comment, "
    "metadata, created, state, adapter, version, reason, conflicts_with, pattern_id, model, "
    "base_hash, adapter_versions, prompt_text, prompt_ids, prompt_vector, answer_text, answer_ids"
)


def find_request(
    connection: sqlite3.Connection, tenant: str, request_id: str, *, oldest: float
) -> RequestRecord | None:
    """The request, unless it was made before `oldest` and merely waits for its purge."""
    row = connection.execute(
        f"SELECT {_REQUEST} FROM requests WHERE tenant = ? AND request_id = ? AND created >= ?",
        (tenant, request_id, oldest),
    ).fetchone()
    return None if row is None else _request_record(row)


def has_request(
    connection: sqlite3.Connection, tenant: str, request_id: str, *, oldest: float
) -> bool:
    """Whether `find_request` would find it, without reading it."""
    row = connection.execute(
        "SELECT 1 FROM requests WHERE tenant = ? AND request_id = ? AND created >= ?",
        (tenant, request_id, oldest),
    ).fetchone()
    return row is not None


def find_feedback(
    connection: sqlite3.Connection, tenant: str, feedback_id: str
) -> FeedbackRecord | None:
    """The feedback under the client's id."""
    row = connection.execute(
        f"SELECT {_FEEDBACK} FROM feedback WHERE tenant = ? AND feedback_id = ?",
        (tenant, feedback_id),
    ).fetchone()
    return None if row is None else _feedback_record(row)


def feedback_by_seq(connection: sqlite3.Connection, seqs: Iterable[int]) -> list[FeedbackRecord]:
    """Those that exist, by rising seq."""
    rows = (
        connection.execute(f"SELECT {_FEEDBACK} FROM feedback WHERE seq = ?", (seq,)).fetchone()
        for seq in sorted(set(seqs))
    )
    return [_feedback_record(row) for row in rows if row is not None]


def pending(connection: sqlite3.Connection, after_seq: int, limit: int) -> list[FeedbackRecord]:
    """Learnable, not yet learned feedback after the cursor, by rising seq."""
    rows = connection.execute(
        f"SELECT {_FEEDBACK} FROM feedback INDEXED BY feedback_pending "
        "WHERE state = 'ACCEPTED' AND is_learnable = 1 AND seq > ? ORDER BY seq LIMIT ?",
        (after_seq, limit),
    )
    return [_feedback_record(row) for row in rows]


def of_pattern(
    connection: sqlite3.Connection, pattern_id: int, states: Iterable[FeedbackState]
) -> list[PatternFeedback]:
    """A pattern's feedback in these states with positions, by rising seq."""
    wanted = [state.value for state in states]
    marks = ", ".join("?" * len(wanted))
    rows = connection.execute(
        f"SELECT {_FEEDBACK} FROM feedback WHERE pattern_id = ? AND state IN ({marks}) "
        "ORDER BY seq",
        (pattern_id, *wanted),
    )
    records = [_feedback_record(row) for row in rows]
    return [PatternFeedback(record, positions(connection, record.seq)) for record in records]


def positions(connection: sqlite3.Connection, seq: int) -> Positions | None:
    """The captured positions of one feedback; None when it has none."""
    rows = connection.execute(
        "SELECT position_index, target_id, kind, num_top, states FROM positions "
        "WHERE seq = ? ORDER BY position_index",
        (seq,),
    ).fetchall()
    if not rows:
        return None
    return codec.unpack_positions([tuple(row) for row in rows], where=f"feedback {seq}")


def counts(connection: sqlite3.Connection) -> tuple[int, dict[FeedbackState, int], int]:
    """Requests, feedback by state, pending feedback."""
    (num_requests,) = connection.execute("SELECT count(*) FROM requests").fetchone()
    by_state = dict.fromkeys(FeedbackState, 0)
    for state, num in connection.execute("SELECT state, count(*) FROM feedback GROUP BY state"):
        by_state[FeedbackState(state)] = num
    (num_pending,) = connection.execute(
        "SELECT count(*) FROM feedback INDEXED BY feedback_pending "
        "WHERE state = 'ACCEPTED' AND is_learnable = 1"
    ).fetchone()
    return num_requests, by_state, num_pending


def _request_record(row: sqlite3.Row) -> RequestRecord:
    where = f"request {row['request_id']!r} of tenant {row['tenant']!r}"
    return RequestRecord(
        tenant=row["tenant"],
        principal=row["principal"],
        request_id=row["request_id"],
        model=row["model"],
        base_hash=row["base_hash"],
        created=row["created"],
        prompt_ids=codec.unpack_ids(row["prompt_ids"], where=where),
        prompt_text=row["prompt_text"],
        prompt_vector=codec.unpack_vector(row["prompt_vector"], where=where),
        choices=codec.load_choices(row["choices"]),
        adapter_versions=codec.load_spans(row["adapter_versions"]),
    )


def _feedback_record(row: sqlite3.Row) -> FeedbackRecord:
    where = f"feedback {row['feedback_id']!r} of tenant {row['tenant']!r}"
    return FeedbackRecord(
        seq=row["seq"],
        tenant=row["tenant"],
        principal=row["principal"],
        feedback_id=row["feedback_id"],
        request_id=row["request_id"],
        choice_index=row["choice_index"],
        signal=codec.load_signal(row["kind"], row["payload"]),
        comment=row["comment"],
        metadata=json.loads(row["metadata"]),
        created=row["created"],
        state=FeedbackState(row["state"]),
        adapter=row["adapter"],
        version=row["version"],
        reason=row["reason"],
        conflicts_with=tuple(json.loads(row["conflicts_with"])),
        pattern_id=row["pattern_id"],
        model=row["model"],
        base_hash=row["base_hash"],
        adapter_versions=codec.load_spans(row["adapter_versions"]),
        prompt_text=row["prompt_text"],
        prompt_ids=codec.unpack_ids(row["prompt_ids"], where=where),
        prompt_vector=codec.unpack_vector(row["prompt_vector"], where=where),
        answer=Choice(
            text=row["answer_text"],
            token_ids=codec.unpack_ids(row["answer_ids"], where=where),
        ),
    )
