"""Settings of the commands that answer questions: the backbone, the schedule, and the server's limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dyvte.backbones import BackboneConfig
from dyvte.errors import ConfigError
from dyvte.groups import open_group
from dyvte.policies import POLICIES
from dyvte.reductions import NO_REDUCTION, REDUCTIONS

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """A backbone, and when its visual tokens freeze and leave."""

    model: BackboneConfig = field(metadata=open_group("path"))
    """The backbone: folder or hub id, or the group of its settings, which may also stand beside it."""
    policy: str = field(default="never", metadata={"forms": POLICIES})
    """When visual tokens leave, unless a request says otherwise."""
    gates: Path | None = None
    """Gates that a request may ask for where the policy is another; null: the policy's own, if any."""
    reduction: str = field(default=NO_REDUCTION, metadata={"forms": REDUCTIONS})
    """What is spent on visual tokens before they leave, several joined by "+", or none."""
    template: str = "auto"
    """Prompt template: v1, chat or auto."""
    max_new_tokens: int = 512
    """Tokens of an answer at most, where a request does not say; never more than the context holds."""

    image_store_mb: float = 2048.0
    """Memory for what the model has made of images, so that further questions about them cost their text
    alone; what was used longest ago leaves first. 0: every question pays for its images."""

    def __post_init__(self) -> None:
        _check_positive(self, "max_new_tokens")
        if self.image_store_mb < 0:
            raise ConfigError(f"image_store_mb must not be negative, found {self.image_store_mb}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(AnswerConfig):
    """Settings of ``dyvte serve``."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is this machine alone; there is no password."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    served_name: str | None = None
    """What the model is called in /v1/models; null: its path as given."""
    max_rows: int = 64
    """Answers generated at the same time."""
    max_waiting: int = 256
    """Answers that may wait; a request beyond them gets status 429 and when to come again."""
    max_choices: int = 16
    """Largest n of a request; never more than max_rows."""
    max_images: int = 32
    """Images of a request at most."""
    max_image_mb: float = 20.0
    """Largest image file, in MB."""
    max_megapixels: float = 50.0
    """Largest image, in millions of pixels; found before it is decoded."""
    max_body_mb: float = 100.0
    """Largest request body, in MB."""
    allow_url_prefix: tuple[str, ...] = ()
    """Images may be fetched from URLs that begin with this (https://images.example.org/public/); several.
    Without any, only data: URLs are taken. Redirects are not followed."""
    fetch_seconds: float = 10.0
    """Longest time that fetching an image may take."""
    stop_seconds: float = 30.0
    """When told to stop: how long answers in progress may go on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rows", "max_waiting", "max_choices", "max_images"):
            _check_positive(self, name)
        for name in ("max_image_mb", "max_megapixels", "max_body_mb", "fetch_seconds", "stop_seconds"):
            _check_positive(self, name)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}: expected 0..65535")


def _check_positive(config: AnswerConfig, name: str) -> None:
    if not getattr(config, name) > 0:
        raise ConfigError(f"{name} must be positive, found {getattr(config, name)}")
