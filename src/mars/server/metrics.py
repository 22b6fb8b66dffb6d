"""Figures for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mars.server.worker import Intake

BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self, worker: Intake) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mars_requests", "Requests that were answered; 499 is a client that hung up.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "mars_request_seconds", "From the head of a request to the end of its answer.", ["path"], buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.pictures = Counter("mars_pictures", "Pictures that were drawn for requests.", registry=self.registry)
        self.previews = Counter("mars_previews", "Pictures that were shown half-way.", registry=self.registry)
        self.text_tokens = Counter("mars_text_tokens", "Text ids that were written.", registry=self.registry)
        queue = Gauge("mars_queue", "Pictures and texts that are drawn or wait.", registry=self.registry)
        queue.set_function(lambda: worker.held)
        rows = Gauge("mars_rows", "Rows of the batch that is drawn.", registry=self.registry)
        rows.set_function(lambda: worker.rows)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)
