"""What happens once when a model is loaded: its driver is made, and gates are held to their backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dyvte.backbones.describe import describe_config, model_without_weights, read_config
from dyvte.backbones.fingerprint import tensors_digest
from dyvte.errors import ExitRuntimeError, UnsupportedBackboneError
from dyvte.plugins.vllm.attention import recording
from dyvte.plugins.vllm.driver import Driver, decoder_of
from dyvte.plugins.vllm.options import check_made_for, last_layer, may_leave, options_of
from dyvte.plugins.vllm.reports import Reports
from dyvte.policies import NeverPolicy

# Where vLLM keeps several projections of transformers in one tensor.
_STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def make_driver(model: nn.Module, vllm_config: Any) -> Driver | None:
    """The driver of a model that was just built; None where its engine asks for nothing.

    Raises
    ------
    UnsupportedBackboneError, ConfigError, GateMismatchError
        Layers or attention of a kind for which the policy would not be exact; a policy for another shape.
    """
    options = options_of(vllm_config)
    if options is None:
        if (vllm_config.additional_config or {}).get("dyvte"):
            raise ExitRuntimeError(
                "dyvte's settings reached the model unchecked: is its entry point in the group "
                "vllm.general_plugins switched off (VLLM_PLUGINS)?"
            )
        return None
    config = options.config
    policy = config.parsed()
    if isinstance(policy, NeverPolicy):
        return None
    shape = describe_config(vllm_config.model_config.model)
    policy.check(shape.num_layers, shape.hidden_size)
    stack = decoder_of(model)
    if len(stack.layers) != shape.num_layers:
        raise UnsupportedBackboneError(
            f"vLLM's decoder has {len(stack.layers)} layers, the model's config says {shape.num_layers}"
        )
    for number, layer in enumerate(stack.layers, start=1):
        _check_attention(layer.self_attn.attn, number, leaves=may_leave(policy, shape.num_layers))
    for layer in stack.layers:
        attention = layer.self_attn.attn
        attention.attn_backend = recording(attention.attn_backend)
    if config.text_only_cache:
        from dyvte.plugins.vllm.text_cache import keep_text_only

        keep_text_only(stack.layers[last_layer(policy, shape.num_layers) :])
    policy.to(vllm_config.device_config.device)
    return Driver(stack, policy, options.book, Reports(shape.num_layers, config.log_requests))


def check_identity(model: nn.Module, vllm_config: Any) -> None:
    """Hold the policy's gates to the backbone they were made for; quantised weights are not compared.

    Raises
    ------
    GateMismatchError
        They are another backbone's, and ``allow_transfer`` is not set.
    """
    options = options_of(vllm_config)
    if options is None:
        return
    config = options.config
    policy, path = config.parsed(), vllm_config.model_config.model
    if policy.made_for is None:
        return
    found: dict[str, str | None] = {"fingerprint": describe_config(path).fingerprint}
    if policy.made_for.backbone.get("weights"):
        found["weights"] = weights_digest(decoder_of(model), path)
    check_made_for(policy, found, config)


def weights_digest(stack: nn.Module, path: str) -> str | None:
    """`dyvte.backbones.weights_digest` of the model, from the tensors that vLLM has made of it."""
    reference = model_without_weights(read_config(path)).get_decoder().layers
    tensors = []
    for name, parameter in reference.named_parameters():
        tensor = _find(stack.layers, name)
        if tensor is None or tensor.shape != parameter.shape or not tensor.is_floating_point():
            return None
        tensors.append(tensor)
    return tensors_digest(tensors)


def _find(layers: Any, name: str) -> Tensor | None:
    """A parameter of transformers' decoder layers among vLLM's."""
    *path, module, kind = name.split(".")
    stacked, number = _STACKED.get(module, (module, None))
    try:
        owner = layers.get_submodule(".".join([*path, stacked]))
    except AttributeError:
        return None
    tensor = getattr(owner, kind, None)
    if number is None or tensor is None:
        return tensor
    if stacked == "qkv_proj":
        attention = layers.get_submodule(".".join(path))
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    else:
        sizes = [len(tensor) // 2] * 2
    return tensor.data.split(sizes)[number] if len(tensor) == sum(sizes) else None


def _check_attention(attention: Any, number: int, *, leaves: bool) -> None:
    """Raise where a layer's attention is of a kind for which the smaller batch would not be exact."""
    backend = attention.attn_backend
    problem = None
    if backend.is_mla():
        problem = "it is multi-head latent attention"
    elif getattr(attention, "kv_sharing_target_layer_name", None) is not None:
        problem = "it reads the keys and values of another layer"
    elif backend.forward_includes_kv_cache_update:
        problem = f"the backend {backend.get_name()} writes keys and values inside its attention"
    elif leaves and getattr(attention, "sliding_window", None):
        problem = "a sliding window counts positions, which close up where visual tokens have left"
    elif (
        getattr(attention, "use_alibi_sqrt", False)
        or getattr(attention.impl, "alibi_slopes", None) is not None
    ):
        problem = "ALiBi counts positions"
    if problem is not None:
        raise UnsupportedBackboneError(f"visual tokens cannot freeze or leave in layer {number}: {problem}")
