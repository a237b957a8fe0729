"""What a run's answers depend on: a folder that holds another run is never taken up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import dyvte
from dyvte.backbones import BackboneConfig, decoding_identity, fingerprint, image_padding, weights_digest
from dyvte.backbones.fingerprint import tensors_digest
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.questions import questions_digest
from dyvte.evaluation.settings import NamedPolicy
from dyvte.tasks.base import Benchmark, Question

if TYPE_CHECKING:
    from dyvte.evaluation.runner import EvalConfig

_FORMAT = 3


def identity_of(named: NamedPolicy, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers of one policy and its reductions depend on.

    Parameters
    ----------
    named
        The policy.
    identity
        What all policies share.
    """
    return {**identity, **named.identity, "reduction": named.reduction}


def identity(
    pipeline: Pipeline,
    benchmark: Benchmark,
    questions: Sequence[Question],
    prompts: Sequence[str],
    config: EvalConfig,
) -> Mapping[str, Any]:
    """All that answers depend on beside the policy.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    benchmark
        That is asked.
    questions, prompts
        All, in one order.
    config
        Of the evaluation.
    """
    import transformers

    return {
        "format": _FORMAT,
        "benchmark": benchmark.name,
        "questions": len(questions),
        "questions_sha256": questions_digest(questions, prompts),
        "backbone_fingerprint": fingerprint(pipeline.model),
        "backbone_weights": weights_digest(pipeline.model),
        "template": pipeline.template.version,
        "image_padding": image_padding(pipeline.processor),
        "batch_size": config.batch_size,
        "decoding": decoding_identity(pipeline.model),
        "max_new_tokens": config.max_new_tokens,
        "num_frames": config.num_frames,
        "seed": config.seed,
        "dtype": str(pipeline.model.dtype),
        "attn_implementation": config.model.attn_implementation,
        **({} if config.frame_sampling == "linspace" else {"frame_sampling": config.frame_sampling}),
        **_unusual(config.model),
        **(
            {}
            if pipeline.segmenter is None
            else {"mask_head": tensors_digest(pipeline.segmenter.parameters())}
        ),
        "device": pipeline.device.type,
        "dyvte": dyvte.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _unusual(backbone: BackboneConfig) -> dict[str, str]:
    """What answers depend on and neither weights nor processor tell; only where it is set."""
    packed = {} if backbone.quantization == "none" else {"quantization": backbone.quantization}
    features = {} if backbone.image_features is None else {"image_features": backbone.image_features}
    return {**packed, **features}
