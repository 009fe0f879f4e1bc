"""From replies to the wire: inference, and what everything shares."""

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from engine.api import FinishReason, Token
from sona.journal.records import AdapterSpan
from sona.ports import ModelInfo
from sona.requests import Answer, CallTiming, Delta, GenerateReply, ScoreReply, Started, Usage
from sona.v1 import common_pb2, inference_pb2

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}


def timestamp(unix_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(round(unix_s * 1e6) * 1_000)  # a float holds no more than microseconds
    return stamp


def duration(seconds: float) -> Duration:
    length = Duration()
    length.FromNanoseconds(round(seconds * 1e9))
    return length


def started(event: Started) -> inference_pb2.GenerateStarted:
    return inference_pb2.GenerateStarted(
        request_id=event.request_id, prompt_tokens=event.num_prompt_tokens
    )


def delta(event: Delta) -> inference_pb2.GenerateDelta:
    return inference_pb2.GenerateDelta(
        choice_index=event.choice_index,
        token_ids=[token.token_id for token in event.tokens],
        text=event.text,
        logprobs=_logprobs(event.tokens),
    )


def reply(done: GenerateReply) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=done.request_id,
        choices=[_choice(answer) for answer in done.answers],
        usage=usage(done.usage),
        timing=_timing(done.timing),
        adapter_versions=adapter_versions(done.adapter_versions),
        pattern_ids=done.pattern_ids,
        prompt_logprobs=_logprobs(done.prompt_logprobs),
    )


def score(done: ScoreReply) -> inference_pb2.ScoreResponse:
    return inference_pb2.ScoreResponse(
        logprobs=_logprobs(done.logprobs),
        usage=usage(done.usage),
        adapter_versions=adapter_versions(done.adapter_versions),
    )


def usage(counted: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=counted.num_prompt_tokens,
        cached_prompt_tokens=counted.num_cached_prompt_tokens,
        completion_tokens=counted.num_completion_tokens,
        accepted_draft_tokens=counted.num_accepted_draft_tokens,
    )


def adapter_versions(spans: Sequence[AdapterSpan]) -> list[common_pb2.AdapterVersion]:
    """One message per version, its spans together."""
    versions: dict[tuple[str, int], common_pb2.AdapterVersion] = {}
    for span in spans:
        version = versions.setdefault(
            (span.name, span.version),
            common_pb2.AdapterVersion(name=span.name, version=span.version),
        )
        version.spans.append(common_pb2.TokenSpan(start=span.start, end=span.end))
    return list(versions.values())


def model(info: ModelInfo) -> inference_pb2.Model:
    return inference_pb2.Model(
        name=info.name,
        architecture=info.architecture,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        num_parameters=info.num_parameters,
        dtype=info.dtype,
        base_hash=info.base_hash,
    )


def _choice(answer: Answer) -> inference_pb2.Choice:
    choice = inference_pb2.Choice(
        index=answer.index,
        text=answer.text,
        token_ids=answer.token_ids,
        logprobs=_logprobs(answer.logprobs),
        finish_reason=_FINISH[answer.finish_reason],
    )
    if isinstance(answer.stop_match, str):
        choice.stop_string = answer.stop_match
    elif answer.stop_match is not None:
        choice.stop_token_id = answer.stop_match
    return choice


def _logprobs(tokens: Sequence[Token]) -> list[inference_pb2.TokenLogprob]:
    """Empty unless log-probabilities were asked for."""
    return [
        inference_pb2.TokenLogprob(
            token_id=token.token_id,
            logprob=token.logprob,
            top=[
                inference_pb2.TopLogprob(token_id=one.token_id, logprob=one.logprob)
                for one in token.top
            ],
        )
        for token in tokens
        if token.logprob is not None
    ]


def _timing(spent: CallTiming) -> inference_pb2.Timing:
    return inference_pb2.Timing(
        queue=duration(spent.queue_s),
        prefill=duration(spent.prefill_s),
        routing=duration(spent.routing_s),
        decode=duration(spent.decode_s),
        total=duration(spent.total_s),
    )
