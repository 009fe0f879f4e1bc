"""What the writer thread does to journal.db. Each function is one call of a commit group.

Every rule is decided on rows of the writer's own transaction, so no race can break one.
"""

import sqlite3
from collections.abc import Iterable

import numpy as np

from sona.errors import (
    FeedbackConflict,
    FeedbackNotFound,
    ForeignRequest,
    InvalidRequest,
    RequestExists,
    RequestNotFound,
)
from sona.journal import codec, reads
from sona.journal.records import (
    FeedbackDraft,
    FeedbackOutcome,
    FeedbackState,
    RequestRecord,
    StateChange,
    is_learnable,
)

_ROWS_PER_INSERT = 1_000  # six values each; SQLite takes 32,766 in one statement


def insert_request(
    connection: sqlite3.Connection, request: RequestRecord, *, oldest: float
) -> None:
    """Store a request. Raises RequestExists."""
    key = (request.tenant, request.request_id)
    connection.execute(
        "DELETE FROM requests WHERE tenant = ? AND request_id = ? AND created < ?", (*key, oldest)
    )
    if reads.has_request(connection, *key, oldest=oldest):
        raise RequestExists(
            f"request_id {request.request_id!r} was used before; leave it empty to get one, or "
            "choose one that is new within the retention time"
        )
    _insert(
        connection,
        "requests",
        {
            "tenant": request.tenant,
            "principal": request.principal,
            "request_id": request.request_id,
            "model": request.model,
            "base_hash": request.base_hash,
            "created": request.created,
            "prompt_ids": codec.pack_ids(request.prompt_ids),
            "prompt_text": request.prompt_text,
            "prompt_vector": codec.pack_vector(request.prompt_vector),
            "choices": codec.dump_choices(request.choices),
            "adapter_versions": codec.dump_spans(request.adapter_versions),
        },
    )


def insert_feedback(
    connection: sqlite3.Connection,
    draft: FeedbackDraft,
    positions: list[codec.PositionRow],
    *,
    oldest: float,
) -> FeedbackOutcome:
    """Store a feedback with its request's content, or find that it is here already.

    Raises:
      FeedbackConflict: the id is taken by other content.
      RequestNotFound, ForeignRequest, InvalidRequest: the request cannot take it.
    """
    digest = codec.content_hash(draft)
    if (earlier := _find_earlier(connection, draft, digest)) is not None:
        return earlier
    request = _request_of(connection, draft, oldest=oldest)
    kind, payload = codec.dump_signal(draft.signal)
    answer = request.choices[draft.choice_index]
    seq = _insert(
        connection,
        "feedback",
        {
            "tenant": draft.tenant,
            "feedback_id": draft.feedback_id,
            "principal": draft.principal,
            "request_id": draft.request_id,
            "choice_index": draft.choice_index,
            "content_hash": digest,
            "created": draft.created,
            "state": FeedbackState.ACCEPTED.value,
            "is_learnable": is_learnable(draft.signal),
            "pattern_id": draft.pattern_id,
            "kind": kind.value,
            "payload": payload,
            "comment": draft.comment,
            "metadata": codec.dump_strings(draft.metadata),
            "model": request.model,
            "base_hash": request.base_hash,
            "adapter_versions": codec.dump_spans(request.adapter_versions),
            "prompt_ids": codec.pack_ids(request.prompt_ids),
            "answer_ids": codec.pack_ids(answer.token_ids),
            "prompt_text": request.prompt_text,
            "answer_text": answer.text,
            "prompt_vector": codec.pack_vector(request.prompt_vector),
        },
    )
    _insert_positions(connection, seq, positions)
    (record,) = reads.feedback_by_seq(connection, [seq])
    return FeedbackOutcome(record, is_duplicate=False)


def put_positions(
    connection: sqlite3.Connection,
    seq: int,
    positions: list[codec.PositionRow],
    *,
    base_hash: str,
    prompt_vector: np.ndarray | None,
) -> None:
    """Add or renew positions; those of another base model go first. Raises FeedbackNotFound."""
    row = connection.execute(
        "SELECT state, base_hash FROM feedback WHERE seq = ?", (seq,)
    ).fetchone()
    if row is None or row["state"] == FeedbackState.REMOVED:
        raise FeedbackNotFound(f"feedback {seq} is unknown or was removed; drop its positions")
    if row["base_hash"] != base_hash:
        connection.execute("DELETE FROM positions WHERE seq = ?", (seq,))
        connection.execute("UPDATE feedback SET base_hash = ? WHERE seq = ?", (base_hash, seq))
    if prompt_vector is not None:
        connection.execute(
            "UPDATE feedback SET prompt_vector = ? WHERE seq = ?",
            (codec.pack_vector(prompt_vector), seq),
        )
    _insert_positions(connection, seq, positions)


def change_state(connection: sqlite3.Connection, seqs: Iterable[int], change: StateChange) -> int:
    """Set what the change names on every feedback that is there and not REMOVED; their number."""
    conflicts = change.conflicts_with
    values = {
        "state": change.state.value,
        "adapter": change.adapter,
        "version": change.version,
        "reason": change.reason,
        "conflicts_with": None if conflicts is None else codec.dump_strings(conflicts),
        "pattern_id": change.pattern_id,
        "is_learnable": change.is_learnable,
    }
    values = {name: value for name, value in values.items() if value is not None}
    sets = ", ".join(f"{name} = ?" for name in values)
    cursor = connection.executemany(
        f"UPDATE feedback SET {sets} WHERE seq = ? AND state <> 'REMOVED'",
        [(*values.values(), seq) for seq in set(seqs)],
    )
    return cursor.rowcount


def remove_feedback(connection: sqlite3.Connection, seqs: Iterable[int], reason: str) -> int:
    """Erase content and positions; id, hash, adapter and state REMOVED stay. Their number."""
    removed = 0
    for record in reads.feedback_by_seq(connection, seqs):
        if record.state is FeedbackState.REMOVED:
            continue
        kind, payload = codec.dump_signal(codec.emptied(record.signal))
        connection.execute(
            "UPDATE feedback SET state = 'REMOVED', reason = ?, kind = ?, payload = ?, "
            "comment = '', metadata = '{}', prompt_text = NULL, prompt_ids = ?, answer_text = '', "
            "answer_ids = ?, prompt_vector = NULL WHERE seq = ?",
            (reason, kind.value, payload, codec.pack_ids(()), codec.pack_ids(()), record.seq),
        )
        connection.execute("DELETE FROM positions WHERE seq = ?", (record.seq,))
        removed += 1
    return removed


def purge_requests(connection: sqlite3.Connection, *, oldest: float, limit: int) -> int:
    """Delete at most `limit` requests made before `oldest`; their number."""
    return connection.execute(
        "DELETE FROM requests WHERE rowid IN "
        "(SELECT rowid FROM requests WHERE created < ? ORDER BY created LIMIT ?)",
        (oldest, limit),
    ).rowcount


def _find_earlier(
    connection: sqlite3.Connection, draft: FeedbackDraft, digest: bytes
) -> FeedbackOutcome | None:
    row = connection.execute(
        "SELECT content_hash FROM feedback WHERE tenant = ? AND feedback_id = ?",
        (draft.tenant, draft.feedback_id),
    ).fetchone()
    if row is None:
        return None
    if row["content_hash"] != digest:
        raise FeedbackConflict(
            f"feedback_id {draft.feedback_id!r} was used for other content; repeat a feedback "
            "unchanged, or send new content under a new id"
        )
    record = reads.find_feedback(connection, draft.tenant, draft.feedback_id)
    assert record is not None, "the row was read a moment ago in this transaction"
    return FeedbackOutcome(record, is_duplicate=True)


def _request_of(
    connection: sqlite3.Connection, draft: FeedbackDraft, *, oldest: float
) -> RequestRecord:
    request = reads.find_request(connection, draft.tenant, draft.request_id, oldest=oldest)
    if request is None:
        raise RequestNotFound(missing_request(draft.request_id))
    if request.principal != draft.principal:
        raise ForeignRequest(
            f"request {draft.request_id!r} was made by another principal; feedback is taken only "
            "from the one who made the request: send it with that key"
        )
    if not 0 <= draft.choice_index < len(request.choices):
        raise InvalidRequest(
            f"choice_index is {draft.choice_index}; request {draft.request_id!r} has "
            f"{len(request.choices)} choices, counted from 0"
        )
    return request


def missing_request(request_id: str) -> str:
    """The message for a request that is not kept."""
    return (
        f"request {request_id!r} is not kept: it is unknown, older than the retention time, or was "
        "sent with learn=false; give the request_id of a recent answer"
    )


def _insert_positions(
    connection: sqlite3.Connection, seq: int, positions: list[codec.PositionRow]
) -> None:
    # One statement: between two, another Python thread may hold the writer up for milliseconds.
    for start in range(0, len(positions), _ROWS_PER_INSERT):
        chunk = positions[start : start + _ROWS_PER_INSERT]
        marks = ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(chunk))
        connection.execute(
            f"INSERT OR REPLACE INTO positions VALUES {marks}",
            [value for row in chunk for value in (seq, *row)],
        )


def _insert(connection: sqlite3.Connection, table: str, values: dict[str, object]) -> int:
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    cursor = connection.execute(
        f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values())
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid
