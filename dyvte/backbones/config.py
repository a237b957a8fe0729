"""Which backbone, and how it is loaded: the one declaration of it, shared by every command and plug-in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen backbone; :func:`~dyvte.backbones.open_backbone` loads it.

    In a configuration it is the group ``model``; a text alone is its ``path``, and its other settings may
    stand beside ``model`` (see :func:`dyvte.groups.open_group`).
    """

    path: str = field(metadata={"path": True})
    """Folder or hub id of a transformers image-text-to-text model and its processor; or the folder of a PEFT
    adapter, which names its backbone."""
    adapter: str | None = field(default=None, metadata={"path": True})
    """PEFT adapter to put on the model: folder or hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is as stored on a GPU and float32 on a CPU."""
    attn_implementation: str = "sdpa"
    """"sdpa", "eager" or "flash_attention_2"."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    image_padding: Literal["auto", "square", "none"] = "auto"
    """Pad images to a square as LLaVA-1.5 does; "auto": where the backbone is a LLaVA-1.5."""
    image_features: str | None = None
    """``module:function`` from images to features, for a folder without a vision tower (VILA, Eagle)."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Load the weights in 8 or 4 bits (bitsandbytes, on a GPU); gates learn what that model says."""
    device: str | None = None
    """Where it runs, such as cuda:1 or cpu; null: this process's GPU where there is one, else the CPU."""
