"""Backbones in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from dyvte.errors import UnsupportedBackboneError


def quantized_arguments(
    name: str, dtype: str | torch.dtype, device: str | torch.device | None
) -> dict[str, Any]:
    """What ``from_pretrained`` needs for packed weights; they are put on the device while they are read.

    Parameters
    ----------
    name
        "none", "int8" (LLM.int8) or "nf4" (QLoRA's 4-bit normal float).
    dtype
        Precision that 4-bit layers compute in; bfloat16 where it is "auto".

    Returns
    -------
    dict
        Empty for "none".

    Raises
    ------
    UnsupportedBackboneError
        If the name is unknown, or bitsandbytes is not installed.
    """
    if name == "none":
        return {}
    if name not in ("int8", "nf4"):
        raise UnsupportedBackboneError(f"quantization {name!r}: expected 'none', 'int8' or 'nf4'")
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UnsupportedBackboneError(
            f"quantization {name!r} needs the bitsandbytes package (and, in practice, a GPU), which is not "
            "installed: pip install bitsandbytes, or use quantization 'none'"
        )
    if name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    return {"quantization_config": config, "device_map": {"": "cpu" if device is None else str(device)}}
