"""Prometheus metrics: what the engine counts, and the latencies of requests."""

from __future__ import annotations

from typing import Any, Iterator, Sequence, Tuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from colora_ms.serving.engine import Engine
from colora_ms.serving.handle import RequestHandle

#: (key of ``Engine.stats``, name, whether it only grows, meaning).
ENGINE = (
    ("waiting", "colora_requests_waiting", False, "Requests in the queue."),
    ("starting", "colora_requests_starting", False, "Requests whose prompts are being computed."),
    ("running", "colora_requests_running", False, "Requests in the running batch."),
    ("rows", "colora_batch_rows", False, "Rows of the batch."),
    ("rows_used", "colora_batch_rows_used", False, "Rows of the batch in use."),
    ("submitted", "colora_requests_submitted", True, "Requests that the engine took."),
    ("refused", "colora_requests_refused", True, "Requests that the engine refused."),
    ("finished", "colora_requests_finished", True, "Requests that ended by themselves."),
    ("cancelled", "colora_requests_cancelled", True, "Requests that were cancelled."),
    ("timeouts", "colora_requests_timed_out", True, "Requests that took too long."),
    ("failed", "colora_requests_failed", True, "Requests that failed after they were taken."),
    ("prompt_tokens", "colora_prompt_tokens", True, "Tokens of prompts."),
    ("cached_tokens", "colora_prompt_tokens_cached", True, "Prompt tokens of all rows taken from the prefix cache."),
    ("prompt_rows_tokens", "colora_prompt_tokens_computed", True, "Tokens of prompts of all rows that were computed."),
    ("generated_tokens", "colora_generated_tokens", True, "Tokens generated."),
    ("steps", "colora_steps", True, "Decoding steps."),
    ("row_steps", "colora_row_steps", True, "Rows in use summed over the steps; over colora_steps: the batch's fill."),
    ("blocks", "colora_cache_blocks", False, "Blocks of the key/value cache."),
    ("blocks_used", "colora_cache_blocks_used", False, "Blocks that requests hold."),
    ("evicted_blocks", "colora_cache_blocks_evicted", True, "Blocks whose content was given up for another one."),
    ("preemptions", "colora_preemptions", True, "Requests that gave their blocks back and were computed again."),
    ("failures", "colora_engine_failures", True, "Graph failures that the engine recovered from."),
    ("graphs", "colora_graphs_compiled", False, "Graphs compiled."),
    ("cache_bytes", "colora_cache_bytes", False, "Bytes of the key/value cache."),
)
#: The same of ``AdapterBank.info``.
BANK = (
    ("max_loaded", "colora_adapter_slots", False, "Adapter slots."),
    ("loaded", "colora_adapter_slots_used", False, "Adapter slots in use."),
    ("pinned", "colora_adapter_slots_pinned", False, "Adapter slots that running requests hold."),
    ("hits", "colora_adapter_slot_hits", True, "Requests that found their adapter in a slot."),
    ("loads", "colora_adapter_slot_loads", True, "Adapters put into a slot."),
    ("evictions", "colora_adapter_slot_evictions", True, "Adapters pushed out of a slot."),
    ("reads", "colora_adapter_reads", True, "Adapter folders read."),
    ("host_evictions", "colora_adapter_host_evictions", True, "Adapters pushed out of host memory."),
    ("slot_bytes", "colora_adapter_slot_bytes", False, "Bytes of all slots."),
    ("host_bytes", "colora_adapter_host_bytes", False, "Bytes of adapters in host memory."),
)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The server's metrics.

    Args:
        engine: :class:`colora_ms.serving.Engine`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, meaning: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(name, meaning, buckets=buckets, registry=self._registry)

        self._queue = histogram("colora_queue_seconds", "From submission to the batch.")
        self._first = histogram("colora_first_token_seconds", "From submission to the first token.")
        self._token = histogram("colora_token_seconds", "Mean time between the tokens of a request.", _TOKEN_SECONDS)
        self._total = histogram("colora_request_seconds", "From submission to the end.")
        self.responses = Counter("colora_http_responses", "HTTP responses.", ("method", "route", "status"),
                                 registry=self._registry)

    def observe(self, handle: RequestHandle) -> None:
        """Take the latencies of a request that ended."""
        timing, count = handle.timing, handle.usage.generated
        for histogram, end in ((self._queue, timing.admitted), (self._first, timing.first_token),
                               (self._total, timing.finished)):
            if end is not None:
                histogram.observe(end - timing.submitted)
        if count > 1 and timing.finished is not None and timing.first_token is not None:
            self._token.observe((timing.finished - timing.first_token) / (count - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, as bytes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """The engine's and the bank's counters (called by the registry)."""
        stats = self._engine.stats()
        for table, values in ((ENGINE, stats), (BANK, stats["bank"])):
            for key, name, grows, meaning in table if values else ():
                yield (CounterMetricFamily if grows else GaugeMetricFamily)(name, meaning, values[key])

    def describe(self) -> Tuple[()]:
        """Nothing: the registry then does not collect when it is made."""
        return ()
