"""Identity of an architecture: a hash of a transformers config."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Fields that change how a model is run or stored, not what it is.
_INCIDENTAL = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "architectures",
    "auto_map",
    "dtype",
    "experts_implementation",
    "gradient_checkpointing",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def config_fingerprint(config: Any) -> str:
    """Hash of a transformers config without the fields that only say how it is run."""
    text = json.dumps(_essential(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _essential(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _essential(v) for k, v in value.items() if k not in _INCIDENTAL}
    if isinstance(value, (list, tuple)):
        return [_essential(v) for v in value]
    return value
