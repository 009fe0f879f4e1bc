"""The engine's updates of a request to its reply."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.api import Final, HeadRef, LoraRef, Token, Update
from sona.journal import AdapterSpan
from sona.requests import Answer, CallTiming, GenerateCall, GenerateReply, Usage


@dataclass(slots=True)
class Growing:
    """One answer of a request, as its updates come."""

    tokens: list[Token] = field(default_factory=list[Token])
    final: Final | None = None

    def take(self, update: Update) -> None:
        """What happened to it."""
        self.tokens += update.tokens
        self.final = update.final or self.final

    def ended(self) -> Final:
        """How it ended."""
        assert self.final is not None, "the engine ends every answer of a job"
        return self.final


@dataclass(frozen=True, slots=True)
class ChosenLora:
    """The LoRAs of a request: as one for the engine, by name and version for the reply."""

    ref: LoraRef | None
    names: tuple[tuple[str, int], ...]

    def base_hash(self, of_model: str) -> str:
        """Fingerprint of everything below the head; feedback is learned for that alone."""
        if self.ref is None:
            return of_model
        return hashlib.sha256(repr((of_model, self.ref.identity)).encode()).hexdigest()


def spans(
    loras: Sequence[tuple[str, int]], head: HeadRef | None, num_tokens: int
) -> tuple[AdapterSpan, ...]:
    """The versions that shaped so many tokens, if any did."""
    if not num_tokens:
        return ()
    names = [*loras] if head is None else [*loras, (head.name, head.version)]
    return tuple(AdapterSpan(name, version, 0, num_tokens) for name, version in names)


def spans_of(loras: Sequence[tuple[str, int]], finals: list[Final]) -> tuple[AdapterSpan, ...]:
    """All answers have the same adapters; the span is that of the longest."""
    num_tokens = max(final.num_completion_tokens for final in finals)
    return spans(loras, finals[0].head, num_tokens)


def reply(
    call: GenerateCall,
    answers: list[Growing],
    loras: Sequence[tuple[str, int]],
    total_s: float,
) -> GenerateReply:
    """The whole outcome, once every answer has ended."""
    finals = [answer.ended() for answer in answers]
    first = finals[0]
    has_logprobs = call.sampling.logprobs is not None
    return GenerateReply(
        request_id=call.request_id,
        answers=tuple(
            Answer(
                index=index,
                text=final.text,
                token_ids=final.token_ids,
                logprobs=tuple(answer.tokens) if has_logprobs else (),
                finish_reason=final.finish_reason,
                stop_match=final.stop_match,
            )
            for index, (answer, final) in enumerate(zip(answers, finals, strict=True))
        ),
        usage=Usage(
            num_prompt_tokens=first.num_prompt_tokens,
            num_completion_tokens=sum(final.num_completion_tokens for final in finals),
            num_cached_prompt_tokens=first.num_cached_tokens,
        ),
        timing=CallTiming(
            queue_s=first.timing.queue_s,
            prefill_s=first.timing.prefill_s,
            decode_s=max(final.timing.decode_s for final in finals),
            total_s=total_s,
        ),
        prompt_logprobs=first.prompt_tokens,
        adapter_versions=spans_of(loras, finals),
        pattern_ids=() if first.head is None else (int(first.head.slot_key[3]),),
    )
