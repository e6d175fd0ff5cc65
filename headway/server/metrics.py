"""What /metrics shows, in a registry of its own server."""

from typing import Any

from headway.serve.engine import Engine

LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms, seconds."""
EXPERTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
GAUGES = {
    "requests_running": "Replies that run.",
    "requests_waiting": "Replies that wait.",
    "cache_blocks_used": "Blocks that requests hold.",
    "cache_blocks_total": "Blocks of the cache.",
}
TOTALS = {
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were in the cache.",
    "generation_tokens": "Tokens written.",
    "preemptions": "Replies that gave up their blocks and were computed again.",
    "aborted": "Requests whose client left.",
    "failed": "Requests that ended because a step of the engine failed.",
    "failed_steps": "Steps of the engine that failed.",
}


class Metrics:
    """Histograms that the server fills; gauges and totals are read from the engine when asked."""

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry, self._engine = CollectorRegistry(), engine
        self._gauges = {
            name: Gauge(f"headway_{name}", help, registry=self.registry)
            for name, help in GAUGES.items()
        }
        self._totals = {
            name: Counter(f"headway_{name}", help, registry=self.registry)
            for name, help in TOTALS.items()
        }
        self._counted = dict.fromkeys(TOTALS, 0)

        def histogram(name: str, help: str, buckets: Any = LATENCIES) -> Histogram:
            return Histogram(f"headway_{name}", help, buckets=buckets, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token."
        )
        self.between_tokens = histogram(
            "time_between_tokens_seconds", "Between the tokens of a reply."
        )
        self.step = histogram("step_seconds", "Of one step of the engine.")
        self.experts_touched = histogram(
            "experts_touched", "Experts with a token in a step, over the sparse layers.", EXPERTS
        )

        self.busiest_touched = histogram(
            "experts_touched_busiest_rank", "Those of the rank of a mesh that has most.", EXPERTS
        )

    def observe_step(self) -> None:
        """Record the last step; called in the engine's thread."""
        self.step.observe(self._engine.counters.step_seconds)
        self.experts_touched.observe(self._engine.counters.experts_touched)
        self.busiest_touched.observe(self._engine.counters.busiest_touched)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        from prometheus_client import generate_latest

        scheduler, counters = self._engine.scheduler, self._engine.counters
        self._gauges["requests_running"].set(len(scheduler.running))
        self._gauges["requests_waiting"].set(len(scheduler.waiting))
        self._gauges["cache_blocks_used"].set(scheduler.n_held)
        self._gauges["cache_blocks_total"].set(scheduler.n_pages)
        totals = {**vars(counters), "preemptions": scheduler.n_preemptions}
        for name, counter in self._totals.items():
            counter.inc(totals[name] - self._counted[name])
            self._counted[name] = totals[name]
        return generate_latest(self.registry)
