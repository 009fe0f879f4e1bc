"""Requests, feedback and positions for a journal, and a clock that the test moves."""

import ml_dtypes
import numpy as np

from engine import Capture
from sona.journal import (
    AdapterSpan,
    Choice,
    Correction,
    FeedbackDraft,
    PositionKind,
    Positions,
    RequestRecord,
)

NOW = 1_700_000_000.0
HOUR = 3_600.0


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def request(request_id="r1", *, tenant="acme", principal="ann", created=NOW, prompt="When?"):
    return RequestRecord(
        tenant=tenant,
        principal=principal,
        request_id=request_id,
        model="sona-nano",
        base_hash="base-1",
        created=created,
        prompt_ids=(1, 2, 250_000),
        prompt_text=prompt,
        prompt_vector=np.array([0.5, -1.25, 3.0], np.float32),
        choices=(
            Choice(text="on \0 Friday, 12 °C", token_ids=(7, 8)),
            Choice(text="never", token_ids=(9,)),
        ),
        adapter_versions=(AdapterSpan("pattern-3", 4, 0, 2),),
    )


def draft(feedback_id="f1", request_id="r1", *, signal=None, **fields):
    known = {"tenant": "acme", "principal": "ann", "created": NOW} | fields
    signal = Correction("on Monday") if signal is None else signal
    return FeedbackDraft(feedback_id=feedback_id, request_id=request_id, signal=signal, **known)


def positions(indices=(0, 1), *, dim=8, seed=0, num_top=64):
    rng = np.random.default_rng(seed)
    num = len(indices)
    return Positions(
        indices=tuple(indices),
        target_ids=tuple(int(i) for i in rng.integers(0, 1000, num)),
        kinds=tuple(PositionKind.EDIT if i == 0 else PositionKind.CONSTRAINT for i in indices),
        capture=Capture(
            hidden=rng.normal(size=(num, dim)).astype(ml_dtypes.bfloat16),
            top_ids=rng.integers(0, 1000, (num, num_top)).astype(np.int32),
            top_logprobs=rng.normal(size=(num, num_top)).astype(np.float32),
            rest_logprob=np.where(np.arange(num) == 1, -np.inf, -3.25).astype(np.float32),
        ),
    )


def assert_same_positions(got, want):
    assert (got.indices, got.target_ids, got.kinds) == (want.indices, want.target_ids, want.kinds)
    for name in ("hidden", "top_ids", "top_logprobs", "rest_logprob"):
        a, b = getattr(got.capture, name), getattr(want.capture, name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def add(journal, *args, positions=None, **kwargs):
    return journal.add_feedback(draft(*args, **kwargs), positions).result(10).record
