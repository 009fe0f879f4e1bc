"""Prometheus metrics: `sona_*` in base units, in a registry of their own.

Counters of calls and learning steps are kept here as they happen; what the engine and the journal
count themselves is read when somebody scrapes. No label names a user, request, pattern or text.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.api import EngineStats
from sona.journal.records import FeedbackKind, JournalCounts
from sona.requests import GenerateReply

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_UPDATE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 1)


class Metrics:
    """Owns the registry. Methods are cheap and for any thread."""

    def __init__(self, *, version: str, model: str, dtype: str, base_hash: str) -> None:
        disable_created_metrics()  # one more series per counter that nobody asks for
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._registry = registry
        Info("sona_build", "What runs.", registry=registry).info({"version": version})
        Info("sona_model", "What is served.", registry=registry).info(
            {"model": model, "dtype": dtype, "base_hash": base_hash}
        )
        self._make_call_metrics(registry)
        self._make_generation_metrics(registry)
        self._make_learning_metrics(registry)

    def _make_call_metrics(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "sona_grpc_calls",
            "gRPC calls that ended, by status.",
            ("method", "code"),
            registry=registry,
        )
        self._call_s = Histogram(
            "sona_grpc_call_duration_seconds",
            "Time from arrival to end.",
            ("method",),
            buckets=_CALL_S,
            registry=registry,
        )

    def _make_generation_metrics(self, registry: CollectorRegistry) -> None:
        self._generations = Counter(
            "sona_generations",
            "Answers that ended, by reason.",
            ("finish_reason",),
            registry=registry,
        )
        self._adapted = Counter(
            "sona_adapted_generations", "Answers that a learned version shaped.", registry=registry
        )
        self._first_token_s = Histogram(
            "sona_time_to_first_token_seconds",
            "Arrival to first token.",
            buckets=_CALL_S,
            registry=registry,
        )
        self._token_s = Histogram(
            "sona_time_per_output_token_seconds",
            "Mean time per token after the first.",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._phases = Histogram(
            "sona_generation_phase_seconds",
            "Time of an answer, by phase.",
            ("phase",),
            buckets=_CALL_S,
            registry=registry,
        )

    def _make_learning_metrics(self, registry: CollectorRegistry) -> None:
        self._feedback = Counter(
            "sona_feedback_submissions",
            "Feedback submitted, by kind and outcome.",
            ("kind", "outcome"),
            registry=registry,
        )
        self._update_s = Histogram(
            "sona_instant_update_seconds",
            "States in hand to table handed to the engine.",
            ("step",),
            buckets=_UPDATE_S,
            registry=registry,
        )
        self._publish_s = Histogram(
            "sona_publish_delay_seconds",
            "Feedback committed to version live.",
            buckets=_CALL_S,
            registry=registry,
        )
        self._versions = Counter(
            "sona_adapter_versions",
            "Versions that went live, by what made them.",
            ("kind",),
            registry=registry,
        )
        self._failed_steps = Counter(
            "sona_learning_step_failures",
            "Learning steps that failed; what was live stayed.",
            registry=registry,
        )
        self._paused = Gauge(
            "sona_learning_paused", "1 while learning is paused or disabled.", registry=registry
        )

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's counters at every scrape."""
        self._registry.register(cast(Collector, _Collected(lambda: _engine_families(stats()))))

    def watch_journal(self, counts: Callable[[], JournalCounts]) -> None:
        """Read the journal's counters at every scrape."""
        self._registry.register(cast(Collector, _Collected(lambda: _journal_families(counts()))))

    def watch_adapters(self, num_adapters: Callable[[], int], num_loras: Callable[[], int]) -> None:
        """Read the number of adapters with a live version, and of loaded LoRAs, at every scrape."""
        for name, help_text, count in (
            ("sona_adapters", "Learned adapters with a live version, all tenants.", num_adapters),
            ("sona_loras", "LoRAs loaded, all tenants.", num_loras),
        ):
            Gauge(name, help_text, registry=self._registry).set_function(count)

    def call_ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """A gRPC call ended; `method` is one of ours. The server's `observe`."""
        self._calls.labels(method, code.name).inc()
        self._call_s.labels(method).observe(seconds)

    def generation_ended(self, reply: GenerateReply, first_token_s: float | None) -> None:
        """An answer ended. `first_token_s` counts from arrival; None: there was no token."""
        for answer in reply.answers:
            self._generations.labels(answer.finish_reason.value).inc()
        if reply.pattern_ids:
            self._adapted.inc()
        timing = reply.timing
        for phase, seconds in (
            ("queue", timing.queue_s),
            ("prefill", timing.prefill_s),
            ("routing", timing.routing_s),
            ("decode", timing.decode_s),
        ):
            self._phases.labels(phase).observe(seconds)
        if first_token_s is None:
            return
        self._first_token_s.observe(first_token_s)
        later = max(len(answer.token_ids) for answer in reply.answers) - 1
        if later > 0:
            self._token_s.observe(max(0.0, timing.total_s - first_token_s) / later)

    def feedback_submitted(self, kind: FeedbackKind, outcome: str) -> None:
        """`outcome`: accepted, duplicate or refused."""
        self._feedback.labels(kind.value, outcome).inc()

    def instant_update(self, step: str, seconds: float) -> None:
        """`step`: first (one bisection step) or sweeps."""
        self._update_s.labels(step).observe(seconds)

    def version_published(self, kind: str, delay_s: float | None = None) -> None:
        """`kind` as in the store; `delay_s` from the feedback's commit."""
        self._versions.labels(kind).inc()
        if delay_s is not None:
            self._publish_s.observe(delay_s)

    def learning_step_failed(self) -> None:
        self._failed_steps.inc()

    def learning_paused(self, is_paused: bool) -> None:
        self._paused.set(is_paused)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collected:
    """Families made afresh at every scrape."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families()

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would scrape


def _engine_families(stats: EngineStats) -> Iterator[Metric]:
    used = stats.num_pages - stats.num_free_pages - stats.num_idle_pages
    for name, help_text, value in (
        ("sona_requests_running", "Requests in the batch.", stats.num_running),
        ("sona_requests_waiting", "Requests queued.", stats.num_waiting),
        ("sona_prompt_tokens_waiting", "Tokens of their prompts.", stats.num_waiting_tokens),
        ("sona_kv_pages", "Pages of the KV pool.", stats.num_pages),
        ("sona_kv_pages_free", "Of these, free.", stats.num_free_pages),
        ("sona_kv_pages_idle", "Of these, cached prefixes nobody uses.", stats.num_idle_pages),
        ("sona_kv_pages_sessions", "Pages that sessions keep warm.", stats.num_session_pages),
        ("sona_kv_cache_usage_ratio", "Share of pages in use.", used / max(1, stats.num_pages)),
        ("sona_resident_heads", "Learned versions on the device.", stats.num_resident_heads),
        ("sona_resident_loras", "LoRA versions on the device.", stats.num_resident_loras),
    ):
        yield GaugeMetricFamily(name, help_text, value)
    for name, help_text, value in (
        ("sona_preemptions", "Requests preempted.", stats.num_preemptions),
        ("sona_recompiles", "Programs compiled after ready.", stats.num_recompiles),
        ("sona_prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens),
        ("sona_cached_prompt_tokens", "Prompt tokens found cached.", stats.num_cached_tokens),
        ("sona_generation_tokens", "Tokens generated.", stats.num_generated_tokens),
        ("sona_engine_steps", "Steps of the engine.", stats.num_steps),
        ("sona_engine_busy_seconds", "Engine thread time in steps.", stats.busy_s),
        ("sona_engine_learning_seconds", "Of this, in learning passes.", stats.learning_s),
    ):
        yield CounterMetricFamily(name, help_text, value)


def _journal_families(counts: JournalCounts) -> Iterator[Metric]:
    stored = GaugeMetricFamily("sona_feedback", "Feedback stored, by state.", labels=["state"])
    for state, count in counts.num_feedback.items():
        stored.add_metric([state.value.lower()], count)
    yield stored
    for name, help_text, value in (
        ("sona_feedback_pending", "Learnable feedback not learned yet.", counts.num_pending),
        ("sona_journal_requests", "Requests within retention.", counts.num_requests),
        ("sona_journal_queued_calls", "Calls that wait for their commit.", counts.num_queued),
        ("sona_journal_file_bytes", "Size on disk.", counts.file_bytes),
    ):
        yield GaugeMetricFamily(name, help_text, value)
    for name, help_text, value in (
        ("sona_journal_commits", "Commits, synced.", counts.num_commits),
        ("sona_journal_commit_failures", "Commits that failed.", counts.num_failed_commits),
        ("sona_journal_refused_calls", "Calls refused: queue full.", counts.num_refused_calls),
        ("sona_journal_commit_seconds", "Time in commits.", counts.commit_s),
    ):
        yield CounterMetricFamily(name, help_text, value)
