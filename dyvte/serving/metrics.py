"""What a server counts, in Prometheus's text format: a registry of its own, nothing global."""

from __future__ import annotations

from collections.abc import Callable

from dyvte.serving.asking import FullAnswer

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one server.

    Parameters
    ----------
    num_layers
        L of the backbone.
    waiting, running
        Give the answers that wait, and those that are generated.
    image_bytes
        Gives what the store of images holds.
    """

    def __init__(
        self,
        num_layers: int,
        waiting: Callable[[], int],
        running: Callable[[], int],
        image_bytes: Callable[[], int],
    ) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def made(cls: type, name: str, text: str, *labels: str, **how: object):  # type: ignore[no-untyped-def]
            return cls(f"dyvte_{name}", text, labels, registry=self.registry, **how)

        self.requests = made(Counter, "requests", "Requests by HTTP status.", "status")
        self.cancelled = made(Counter, "cancelled", "Requests whose client went away.")
        self.prompt_tokens = made(Counter, "prompt_tokens", "Prompt tokens, visual ones included.")
        self.visual_tokens = made(Counter, "visual_tokens", "Visual tokens of prompts.")
        self.new_tokens = made(Counter, "generated_tokens", "Tokens generated.")
        self.first_token = made(
            Histogram, "time_to_first_token_seconds", "From the request to its first token.", buckets=_SECONDS
        )
        self.seconds = made(
            Histogram, "request_seconds", "From the request to its last token.", buckets=_SECONDS
        )
        layers = [*range(num_layers + 1)]
        self.exit_layer = made(
            Histogram, "exit_layer", "Exit layer of requests with images.", buckets=[float(k) for k in layers]
        )
        self.compute = made(
            Histogram,
            "visual_compute",
            "Share of the full model's work on visual tokens that was spent.",
            buckets=[step / 10 for step in range(11)],
        )
        self.kv_bytes = made(Counter, "kv_bytes", "Bytes of prompts' keys and values that were kept.")
        self.batch_rows = made(
            Histogram, "batch_rows", "Prompts that were read together.", buckets=[1, 2, 4, 8, 16, 32, 64, 128]
        )
        made(Gauge, "waiting_answers", "Answers that wait.").set_function(waiting)
        made(Gauge, "running_answers", "Answers that are generated.").set_function(running)
        made(Gauge, "image_store_bytes", "What is kept of images.").set_function(image_bytes)

    def answered(self, answer: FullAnswer) -> None:
        """Count a request that was answered."""
        report = answer.report
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.new_tokens.inc(sum(answer.num_tokens))
        self.first_token.observe(answer.first_token)
        self.seconds.observe(answer.total)
        self.kv_bytes.inc(report.kv_bytes)
        if report.exit_layer >= 0:
            self.visual_tokens.inc(report.visual_tokens)
            self.exit_layer.observe(report.exit_layer)
            self.compute.observe(report.visual_compute)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
