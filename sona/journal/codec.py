"""Between records and SQL values. Every blob ends in a CRC-32 that is checked when it is read."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from engine import Capture
from sona.errors import JournalCorrupt
from sona.journal.records import (
    AdapterSpan,
    Choice,
    Correction,
    FeedbackDraft,
    FeedbackKind,
    PositionKind,
    Positions,
    Preference,
    Score,
    Signal,
    Verdict,
)

_CRC_BYTES = 4
_IDS = np.dtype("<i4")
_FLOATS = np.dtype("<f4")


def seal(payload: bytes, *, salt: str = "") -> bytes:
    """Append the checksum over salt and payload. The salt ties a blob to its row."""
    return payload + zlib.crc32(payload, zlib.crc32(salt.encode())).to_bytes(_CRC_BYTES, "little")


def unseal(blob: bytes, *, where: str, salt: str = "") -> bytes:
    """Check and strip the checksum. Raises JournalCorrupt naming `where`."""
    payload = blob[:-_CRC_BYTES]
    if len(blob) < _CRC_BYTES or seal(payload, salt=salt) != blob:
        raise JournalCorrupt(
            f"{where} does not match its checksum; stop the server and restore journal.db from a "
            "backup, or remove the feedback it belongs to"
        )
    return payload


def pack_ids(ids: Sequence[int]) -> bytes:
    return seal(np.asarray(ids, _IDS).tobytes())


def unpack_ids(blob: bytes, *, where: str) -> tuple[int, ...]:
    return tuple(np.frombuffer(unseal(blob, where=where), _IDS).tolist())


def pack_vector(vector: np.ndarray | None) -> bytes | None:
    return None if vector is None else seal(vector.astype(_FLOATS).tobytes())


def unpack_vector(blob: bytes | None, *, where: str) -> np.ndarray | None:
    return None if blob is None else np.frombuffer(unseal(blob, where=where), _FLOATS)


def dump_choices(choices: Sequence[Choice]) -> str:
    return _json([[choice.text, list(choice.token_ids)] for choice in choices])


def load_choices(text: str) -> tuple[Choice, ...]:
    return tuple(Choice(text=text, token_ids=tuple(ids)) for text, ids in json.loads(text))


def dump_spans(spans: Sequence[AdapterSpan]) -> str:
    return _json([[span.name, span.version, span.start, span.end] for span in spans])


def load_spans(text: str) -> tuple[AdapterSpan, ...]:
    return tuple(AdapterSpan(*values) for values in json.loads(text))


def dump_strings(values: Sequence[str] | Mapping[str, str]) -> str:
    return _json(dict(values) if isinstance(values, Mapping) else list(values))


def dump_signal(signal: Signal) -> tuple[FeedbackKind, str]:
    match signal:
        case Correction(text):
            return FeedbackKind.CORRECTION, _json({"text": text})
        case Score(value):
            return FeedbackKind.SCORE, _json({"value": value})
        case Verdict(is_pass):
            return FeedbackKind.VERDICT, _json({"is_pass": is_pass})
        case Preference(chosen, rejected):
            return FeedbackKind.PREFERENCE, _json({"chosen": chosen, "rejected": rejected})


_SIGNALS: dict[FeedbackKind, type[Correction | Score | Verdict | Preference]] = {
    FeedbackKind.CORRECTION: Correction,
    FeedbackKind.SCORE: Score,
    FeedbackKind.VERDICT: Verdict,
    FeedbackKind.PREFERENCE: Preference,
}


def load_signal(kind: str, payload: str) -> Signal:
    return _SIGNALS[FeedbackKind(kind)](**json.loads(payload))


def emptied(signal: Signal) -> Signal:
    """The signal without the user's words; scores and verdicts have none."""
    match signal:
        case Correction():
            return Correction("")
        case Preference():
            return Preference("", "")
        case Score() | Verdict():
            return signal


def content_hash(draft: FeedbackDraft) -> bytes:
    """SHA-256 of everything the client chose, so that a retry is told from a reuse of the id."""
    kind, payload = dump_signal(draft.signal)
    metadata = sorted(draft.metadata.items())
    content = (draft.principal, draft.request_id, draft.choice_index)
    return hashlib.sha256(
        _json([*content, kind, payload, draft.comment, metadata]).encode()
    ).digest()


PositionRow = tuple[int, int, str, int, bytes]
"""Position index, target id, kind, number of top logits, sealed states."""


def pack_positions(positions: Positions) -> list[PositionRow]:
    """One row and one sealed blob per position."""
    capture = positions.capture
    num_top = capture.top_ids.shape[1]
    states = np.empty(len(positions), _state_dtype(capture.hidden.shape[1], num_top))
    states["hidden"] = capture.hidden.astype(ml_dtypes.bfloat16).view(np.uint16)
    states["top_ids"] = capture.top_ids
    states["top_logprobs"] = capture.top_logprobs
    states["rest_logprob"] = capture.rest_logprob
    labels = zip(positions.indices, positions.target_ids, positions.kinds, strict=True)
    return [
        (
            index,
            target,
            kind.value,
            num_top,
            seal(state.tobytes(), salt=_label(index, target, kind)),
        )
        for (index, target, kind), state in zip(labels, states, strict=True)
    ]


def unpack_positions(rows: Sequence[PositionRow], *, where: str) -> Positions:
    """The inverse. At least one row; all of one feedback, which means of one base model."""
    payloads = [
        unseal(blob, where=f"position {index} of {where}", salt=_label(index, target, kind))
        for index, target, kind, _, blob in rows
    ]
    num_top = rows[0][3]
    spare = len(payloads[0]) - _FLOATS.itemsize - num_top * (_IDS.itemsize + _FLOATS.itemsize)
    states = np.frombuffer(b"".join(payloads), _state_dtype(spare // 2, num_top))
    return Positions(
        indices=tuple(row[0] for row in rows),
        target_ids=tuple(row[1] for row in rows),
        kinds=tuple(PositionKind(row[2]) for row in rows),
        capture=Capture(
            hidden=np.ascontiguousarray(states["hidden"]).view(ml_dtypes.bfloat16),
            top_ids=np.ascontiguousarray(states["top_ids"]),
            top_logprobs=np.ascontiguousarray(states["top_logprobs"]),
            rest_logprob=np.ascontiguousarray(states["rest_logprob"]),
        ),
    )


def _state_dtype(dim: int, num_top: int) -> np.dtype[Any]:
    # hidden is bfloat16; NumPy's structured types carry it as its 16 bits.
    return np.dtype(
        [
            ("hidden", "<u2", (dim,)),
            ("top_ids", _IDS, (num_top,)),
            ("top_logprobs", _FLOATS, (num_top,)),
            ("rest_logprob", _FLOATS),
        ]
    )


def _label(index: int, target: int, kind: str) -> str:
    return f"{index}/{target}/{kind}"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
