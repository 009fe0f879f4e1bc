"""What a scrape says: values, names and labels by Prometheus' own rules."""

import re

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.toy_engine import ToyEngine

from engine.api import FinishReason
from sona.journal import AdapterSpan, FeedbackKind, FeedbackState, JournalCounts
from sona.metrics import Metrics
from sona.requests import Answer, CallTiming, GenerateReply, Usage

COUNTS = JournalCounts(
    num_requests=3, num_feedback={FeedbackState.LEARNED: 2, FeedbackState.ACCEPTED: 1},
    num_pending=1, num_queued=0, num_commits=5, num_failed_commits=0, num_committed_calls=6,
    num_refused_calls=0, commit_s=0.5, file_bytes=4_096,
)  # fmt: skip


@pytest.fixture
def metrics():
    made = Metrics(version="1.2", model="toy", dtype="float32", base_hash="abc")
    made.watch_engine(ToyEngine().stats)
    made.watch_journal(lambda: COUNTS)
    made.watch_adapters(lambda: 4, lambda: 3)
    return made


def samples(metrics) -> dict:
    """Name and labels to value, of every sample."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def reply(num_tokens: int, **fields) -> GenerateReply:
    answer = Answer(text="", token_ids=(1,) * num_tokens, finish_reason=FinishReason.STOP)
    return GenerateReply(
        request_id="r",
        answers=(answer,),
        usage=Usage(num_prompt_tokens=2, num_completion_tokens=num_tokens),
        timing=CallTiming(queue_s=0.001, prefill_s=0.2, decode_s=0.8, total_s=1.2),
        **fields,
    )


def test_engine_and_journal_are_read_at_the_scrape(metrics):
    found = samples(metrics)
    assert found["sona_kv_pages",] == 10
    assert found["sona_kv_cache_usage_ratio",] == 0
    assert found["sona_engine_busy_seconds_total",] == 0.5
    assert found["sona_engine_learning_seconds_total",] == 0.25
    assert found["sona_feedback", "learned"] == 2
    assert found["sona_feedback_pending",] == 1
    assert found["sona_journal_commits_total",] == 5
    assert found["sona_adapters",] == 4
    assert found["sona_build_info", "1.2"] == 1


def test_calls_are_counted_by_method_and_end(metrics):
    metrics.call_ended("/sona.v1.X/Y", grpc.StatusCode.OK, 0.003)
    metrics.call_ended("/sona.v1.X/Y", grpc.StatusCode.OK, 7.0)
    metrics.call_ended("/sona.v1.X/Y", grpc.StatusCode.NOT_FOUND, 0.5)
    found = samples(metrics)
    assert found["sona_grpc_calls_total", "/sona.v1.X/Y", "OK"] == 2
    assert found["sona_grpc_calls_total", "/sona.v1.X/Y", "NOT_FOUND"] == 1
    assert found["sona_grpc_call_duration_seconds_count", "/sona.v1.X/Y"] == 3
    assert found["sona_grpc_call_duration_seconds_sum", "/sona.v1.X/Y"] == pytest.approx(7.503)
    assert found["sona_grpc_call_duration_seconds_bucket", "/sona.v1.X/Y", "0.005"] == 1


def test_an_answer_gives_first_token_and_the_mean_of_the_rest(metrics):
    metrics.generation_ended(reply(6), first_token_s=0.2)
    found = samples(metrics)
    assert found["sona_generations_total", "stop"] == 1
    assert found["sona_adapted_generations_total",] == 0
    assert found["sona_time_to_first_token_seconds_sum",] == pytest.approx(0.2)
    # (1.2 - 0.2) seconds for 5 tokens after the first
    assert found["sona_time_per_output_token_seconds_sum",] == pytest.approx(0.2)
    assert found["sona_generation_phase_seconds_sum", "decode"] == pytest.approx(0.8)


def test_an_answer_of_one_token_has_no_later_ones(metrics):
    metrics.generation_ended(reply(1, pattern_ids=(1,)), first_token_s=0.2)
    metrics.generation_ended(reply(0), first_token_s=None)
    found = samples(metrics)
    assert found["sona_adapted_generations_total",] == 1
    assert found["sona_time_to_first_token_seconds_count",] == 1
    assert found["sona_time_per_output_token_seconds_count",] == 0


def test_a_lora_is_not_something_learned(metrics):
    metrics.generation_ended(
        reply(1, adapter_versions=(AdapterSpan("style", 1, 0, 1),)), first_token_s=0.2
    )
    assert samples(metrics)["sona_adapted_generations_total",] == 0
    assert samples(metrics)["sona_loras",] == 3


def test_learning_is_counted(metrics):
    metrics.feedback_submitted(FeedbackKind.CORRECTION, "accepted")
    metrics.instant_update("first", 0.0004)
    metrics.version_published("edit", delay_s=0.02)
    metrics.version_published("rollback")
    metrics.learning_step_failed()
    metrics.learning_paused(True)
    found = samples(metrics)
    assert found["sona_feedback_submissions_total", "accepted", "correction"] == 1
    assert found["sona_instant_update_seconds_bucket", "0.00025", "first"] == 0
    assert found["sona_instant_update_seconds_bucket", "0.0005", "first"] == 1
    assert found["sona_adapter_versions_total", "rollback"] == 1
    assert found["sona_publish_delay_seconds_count",] == 1
    assert found["sona_learning_step_failures_total",] == 1
    assert found["sona_learning_paused",] == 1


def test_names_and_labels_follow_the_rules(metrics):
    test_learning_is_counted(metrics)
    metrics.call_ended("/sona.v1.X/Y", grpc.StatusCode.OK, 0.003)
    metrics.generation_ended(reply(6), first_token_s=0.2)
    text = metrics.render().decode()
    ours = [
        family for family in text_string_to_metric_families(text) if family.name.startswith("sona_")
    ]
    assert len(ours) > 25
    for family in ours:
        assert re.fullmatch(r"sona_[a-z0-9_]+", family.name)
        assert family.documentation, family.name
        assert not re.search(r"_(ms|milliseconds|percent|kb|mb)(_|$)", family.name), family.name
        is_counter = family.type == "counter"
        for sample in family.samples:
            assert sample.name.endswith("_total") == is_counter, sample.name
            forbidden = {"user", "tenant", "principal", "request_id", "pattern", "adapter"}
            assert not forbidden & set(sample.labels), sample.name
    assert "_created" not in text


def test_two_servers_in_one_process_do_not_share_counts(metrics):
    metrics.learning_step_failed()
    other = Metrics(version="1.2", model="toy", dtype="float32", base_hash="abc")
    assert samples(other)["sona_learning_step_failures_total",] == 0
