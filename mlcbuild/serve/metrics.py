"""What a server has done, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlcbuild.serve.engine import Engine

_COUNTS = {
    "prompt_tokens": "tokens of prompts that were computed",
    "reused_tokens": "tokens of prompts that were in the KV cache already",
    "completion_tokens": "tokens of texts that were written",
    "steps": "steps of the engine",
    "cancelled": "texts that nobody waited for any more",
    "failed": "texts that ended with an error of the engine",
}


class Metrics(Collector):
    """Requests by path and status, their seconds, and what each engine counts."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._registry = CollectorRegistry()
        self._registry.register(self)
        names = ("path", "status")
        self._requests = Counter("mlcbuild_requests", "requests answered", names, registry=self._registry)
        self._seconds = Histogram("mlcbuild_request_seconds", "from request to answer", registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered: of a stream, its beginning."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for name, does in _COUNTS.items():
            counter = CounterMetricFamily(f"mlcbuild_{name}", does, labels=["model"])
            for model, engine in self._engines.items():
                counter.add_metric([model], engine.counts[name])
            yield counter
        for name, does in (("running", "texts in the KV cache"), ("waiting", "texts that have not begun")):
            gauge = GaugeMetricFamily(f"mlcbuild_{name}", does, labels=["model"])
            for model, engine in self._engines.items():
                gauge.add_metric([model], getattr(engine, name))
            yield gauge
