"""What /metrics shows, in a registry of its own server."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headway.serve.engine import Engine

if TYPE_CHECKING:
    from prometheus_client import Metric

LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms, seconds."""
EXPERTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """Histograms that the server fills; counters and gauges are read from the engine when asked."""

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Histogram

        self.registry = CollectorRegistry()
        self._engine = engine
        self.registry.register(self)  # type: ignore[arg-type]  # its `collect` is what is needed

        def histogram(name: str, help: str, buckets: Any = LATENCIES) -> Histogram:
            return Histogram(f"headway_{name}", help, buckets=buckets, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token."
        )
        self.between_tokens = histogram(
            "time_between_tokens_seconds", "Between the tokens of a choice."
        )
        self.step = histogram("step_seconds", "Of one step of the engine.")
        self.experts_touched = histogram(
            "experts_touched", "Experts with a token in a step, over the sparse layers.", EXPERTS
        )

    def observe_step(self) -> None:
        """Record the last step; called in the engine's thread."""
        self.step.observe(self._engine.counters.step_seconds)
        self.experts_touched.observe(self._engine.counters.experts_touched)

    def collect(self) -> "Iterator[Metric]":
        """Yield what the engine counts."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        scheduler, counters = self._engine.scheduler, self._engine.counters
        gauges = {
            "requests_running": (len(scheduler.running), "Choices that run."),
            "requests_waiting": (len(scheduler.waiting), "Choices that wait."),
            "cache_blocks_used": (blocks_used(self._engine), "Blocks that requests hold."),
            "cache_blocks_total": (scheduler.pool.n_pages, "Blocks of the cache."),
        }
        for name, (value, help) in gauges.items():
            yield GaugeMetricFamily(f"headway_{name}", help, value)
        totals = {
            "prompt_tokens": (counters.prompt_tokens, "Tokens of prompts."),
            "cached_tokens": (counters.cached_tokens, "Tokens of prompts found in the cache."),
            "generation_tokens": (counters.generation_tokens, "Tokens written."),
            "preemptions": (scheduler.n_preemptions, "Choices that gave up their blocks."),
            "aborted": (counters.aborted, "Requests whose client left."),
        }
        for name, (value, help) in totals.items():
            yield CounterMetricFamily(f"headway_{name}", help, value)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


def blocks_used(engine: Engine) -> int:
    """Return how many blocks of the cache requests hold."""
    return engine.scheduler.pool.n_pages - engine.scheduler.pool.n_free
