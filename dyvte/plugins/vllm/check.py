"""What the plug-in would do for a model, before a long start."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dyvte.backbones.describe import describe_config, read_config
from dyvte.errors import DyvteError
from dyvte.plugins.vllm.checks import check_version
from dyvte.plugins.vllm.names import VERSIONS
from dyvte.plugins.vllm.options import may_leave, our_architecture
from dyvte.plugins.vllm.registration import engine_arguments

_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    holds: bool
    about: str
    text: str


def findings(model: str, policy: str | None = None, *, allow_transfer: bool = False) -> list[Finding]:
    """What holds and what does not, from the model's configuration alone.

    Parameters
    ----------
    model
        Folder or hub id.
    policy
        As for the engine; None: what any policy needs.
    """
    found: list[Finding] = []
    try:
        import vllm

        check_version(vllm.__version__)
        found.append(Finding(True, "vLLM", f"{vllm.__version__}, of the versions {VERSIONS} that were run"))
    except ImportError:
        found.append(
            Finding(False, "vLLM", f"not installed in this environment: pip install 'vllm{VERSIONS}'")
        )
    except DyvteError as error:
        found.append(Finding(False, "vLLM", str(error)))
    try:
        config = read_config(model)
        shape = describe_config(config)
        found.append(
            Finding(
                True, "model", f"{shape.model_type}, {shape.num_layers} layers of size {shape.hidden_size}"
            )
        )
        found.append(Finding(True, "architecture", our_architecture(config)))
    except DyvteError as error:
        return [*found, Finding(False, "model", str(error))]
    text = config.get_text_config(decoder=True)
    found += _attention(text)
    if policy is not None:
        found.append(_policy(model, policy, shape, allow_transfer))
    return found


def command_line(model: str, policy: str, **options: Any) -> str:
    """What starts a server with the policy and other settings of `EngineConfig`."""
    arguments = engine_arguments(model, policy, **options)
    overrides, extra = (json.dumps(arguments[name]) for name in ("hf_overrides", "additional_config"))
    return f"vllm serve {model} --hf-overrides '{overrides}' --additional-config '{extra}'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m dyvte.plugins.vllm.check", description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--policy", help="never, fixed:K, freeze:F[:K] or gates:FOLDER[@THRESHOLD]")
    parser.add_argument("--allow-transfer", action="store_true", help="gates of another backbone")
    given = parser.parse_args(arguments)
    found = findings(given.model, given.policy, allow_transfer=given.allow_transfer)
    for one in found:
        print(f"{'ok ' if one.holds else 'NO '} {one.about}: {one.text}")
    if all(one.holds for one in found):
        options = {"allow_transfer": True} if given.allow_transfer else {}
        print(f"\n{command_line(given.model, given.policy or 'freeze:F', **options)}")
        return 0
    return 1


def _attention(text: Any) -> list[Finding]:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    on_cpu = "" if size in _CPU_HEAD_SIZES else f"; not on a CPU, which serves {_CPU_HEAD_SIZES}"
    found = [Finding(True, "head size", f"{size}{on_cpu}")]
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        found.append(
            Finding(
                True, "sliding windows", "freezing is exact; exits and gates are refused (windows close up)"
            )
        )
    return found


def _policy(model: str, text: str, shape: Any, allow_transfer: bool) -> Finding:
    from dyvte.plugins.vllm.options import EngineConfig, check_made_for
    from dyvte.policies import LearnedPolicy

    about = f"policy {text}"
    try:
        config = EngineConfig(policy=text, allow_transfer=allow_transfer)
        policy = config.parsed()
        policy.check(shape.num_layers, shape.hidden_size)
        check_made_for(policy, {"fingerprint": shape.fingerprint}, config, "give --allow-transfer")
    except DyvteError as error:
        return Finding(False, about, str(error))
    off = []
    if may_leave(policy, shape.num_layers):
        off.append("prefix caching")
    if isinstance(policy, LearnedPolicy):
        off.append("chunked prefill")
    return Finding(True, about, f"served; off with it: {', '.join(off) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
