"""The gates: what they read, how they are stored, and the one place of the decision rule.

Shapes: B rows, L decoder layers, F gate features, D hidden size, N tokens.
Layer numbers k are 1-based: gate k reads the output of the k-th decoder layer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckpointError, ConfigError

FEATURES = ("mean_prompt", "last_prompt")
ARCHITECTURES = ("reference", "compact")
DEFAULT_WIDTH = {"reference": 2048, "compact": 16}
CONFIG_FILE = "gate_config.json"
WEIGHTS_FILE = "gates.safetensors"
_REFERENCE_KEY = re.compile(r"(?:^|\.)visual_gates_router\.(\d+)\.(w[12])\.weight$")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """All that is needed to rebuild a stack of gates and to decide with it; `gate_config.json`.

    Attributes
    ----------
    num_layers, hidden_size
        L and D of the backbone.
    architecture
        "reference": Linear(2D, h), erf GELU, Linear(h, 2), no biases (DyVTE, Eq. 1). "compact": the two
        feature parts RMS-normalised, Linear(2D, h), GELU, Linear(h, 1), with biases.
    gate_hidden_size
        h; 0 means the architecture's own (2048 and 16).
    offsets
        L constants added to the logits; see `uniform_offsets`. Empty means zeros.
    threshold, min_layer, fallback, mode
        The decision rule, see `exit_layers`. ``mode="fixed"``: every row leaves at ``fallback``.
    backbone
        id, model_type and fingerprint of the backbone the gates belong to.
    training, calibration
        Free records of how the weights and the threshold came about.
    """

    num_layers: int
    hidden_size: int
    architecture: str = "compact"
    gate_hidden_size: int = 0
    features: tuple[str, ...] = FEATURES
    offsets: tuple[float, ...] = ()
    threshold: float = 0.5
    min_layer: int = 1
    fallback: int | None = None
    mode: str = "gates"
    backbone: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    dyvte_version: str = ""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"gate architecture {self.architecture!r}: expected one of {ARCHITECTURES}")
        if tuple(self.features) != FEATURES:
            raise ConfigError(f"gate features {tuple(self.features)}: this version knows {FEATURES} only")
        if self.num_layers < 1 or self.hidden_size < 1:
            raise ConfigError(
                f"num_layers {self.num_layers} and hidden_size {self.hidden_size}: expected positive integers"
            )
        check_rule(self.num_layers, self.threshold, self.min_layer, self.fallback, self.mode)
        offsets = tuple(float(x) for x in self.offsets) or (0.0,) * self.num_layers
        if len(offsets) != self.num_layers:
            raise ConfigError(f"{len(offsets)} offsets for {self.num_layers} layers: expected one for each")
        set_field = object.__setattr__
        set_field(self, "features", tuple(self.features))
        set_field(self, "offsets", offsets)
        set_field(self, "gate_hidden_size", self.gate_hidden_size or DEFAULT_WIDTH[self.architecture])
        if not self.dyvte_version:
            from . import __version__

            set_field(self, "dyvte_version", __version__)

    @property
    def feature_size(self) -> int:
        """F."""
        return len(self.features) * self.hidden_size

    def to_json(self) -> str:
        """Pretty JSON text with every field."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """Inverse of `to_json`.

        Raises
        ------
        CheckpointError
            If the text is not JSON, lacks a required field or has one that this version does not know.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{CONFIG_FILE} is not valid JSON: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not {"num_layers", "hidden_size"} <= set(values):
            raise CheckpointError(f"{CONFIG_FILE} must be an object with at least num_layers and hidden_size")
        if unknown := sorted(set(values) - known):
            raise CheckpointError(
                f"{CONFIG_FILE} has unknown fields {unknown}; it may come from a newer dyvte, upgrade to read it"
            )
        return cls(**values)


class _ReferenceGate(nn.Module):
    def __init__(self, feature_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(feature_size, width, bias=False)
        self.w2 = nn.Linear(width, 2, bias=False)

    def forward(self, features_BF: Tensor) -> Tensor:
        both_B2 = self.w2(F.gelu(self.w1(features_BF.to(self.w1.weight.dtype)))).float()
        return both_B2[..., 1] - both_B2[..., 0]


class _CompactGate(nn.Module):
    def __init__(self, feature_size: int, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.w1 = nn.Linear(feature_size, width)
        self.w2 = nn.Linear(width, 1)

    def forward(self, features_BF: Tensor) -> Tensor:
        parts = features_BF.float().unflatten(-1, (self.num_parts, -1))
        normed_BF = F.rms_norm(parts, parts.shape[-1:], eps=1e-6).flatten(-2)
        return self.w2(F.gelu(self.w1(normed_BF.to(self.w1.weight.dtype)))).float().squeeze(-1)


class GateStack(nn.Module):
    """One gate per decoder layer. Gates are separate modules, so a gate that is not used gets no gradient.

    Gate L exists only so that reference checkpoints fit; it never decides anything.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.feature_size, config.gate_hidden_size
        self.gates = nn.ModuleList(
            _ReferenceGate(size, width)
            if config.architecture == "reference"
            else _CompactGate(size, width, len(config.features))
            for _ in range(config.num_layers)
        )

    @staticmethod
    def init(config: GateConfig, seed: int = 0) -> GateStack:
        """New gates: Xavier uniform weights, as in the DyVTE reference code, and zero biases."""
        with torch.device("meta"):
            stack = GateStack(config)
        stack = stack.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for parameter in stack.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        return stack

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def gate(self, k: int, features_BF: Tensor) -> Tensor:
        """(B,) float32: exit minus stay logit of gate k (1-based), offset included."""
        if not 1 <= k <= self.config.num_layers:
            raise ConfigError(f"gate {k}: expected a layer in 1..{self.config.num_layers}")
        return self.gates[k - 1](features_BF) + self.config.offsets[k - 1]

    def forward(self, features_BLF: Tensor) -> Tensor:
        """(B, L) float32 logits of all gates; column k-1 belongs to gate k."""
        if features_BLF.shape[1:] != (self.config.num_layers, self.config.feature_size):
            raise ConfigError(
                f"features have shape {tuple(features_BLF.shape)}, expected (B, L, F) with "
                f"L = {self.config.num_layers} and F = {self.config.feature_size}"
            )
        return torch.stack([self.gate(k, features_BLF[:, k - 1]) for k in range(1, len(self.gates) + 1)], 1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `gate_config.json` and `gates.safetensors`; each file appears whole or not at all."""
        from safetensors.torch import save

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        _write_atomically(Path(folder) / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        save_config(self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GateStack:
        """Read a folder written by `save_pretrained`, or such a repository on the hub.

        Raises
        ------
        CheckpointError
            If a file is missing, or the tensors do not fit the config.
        """
        config, stack = load_checkpoint(folder)
        if stack is None:
            raise CheckpointError(
                f"{folder} has no {WEIGHTS_FILE}: it describes a fixed exit after layer {config.fallback}, "
                "not gates. Use VisualExit.from_pretrained, or train gates."
            )
        return stack

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Tensor], **config_fields: Any) -> GateStack:
        """Gates trained by the DyVTE reference code (`model.visual_gates_router.{i}.w{1,2}.weight`).

        Other keys are ignored, so a whole checkpoint may be given. Offsets are zero and the threshold 0.5:
        the reference's own decision ``logit[1] > logit[0]``.

        Raises
        ------
        CheckpointError
            If no such keys exist, a layer is missing, or shapes disagree.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for name, tensor in state_dict.items():
            if match := _REFERENCE_KEY.search(name):
                found[int(match[1]), match[2]] = tensor
        if not found:
            raise CheckpointError(
                "no key like 'model.visual_gates_router.0.w1.weight' in this state dict: it holds no reference gates"
            )
        num_layers = max(i for i, _ in found) + 1
        missing = [f"{i}.{w}" for i in range(num_layers) for w in ("w1", "w2") if (i, w) not in found]
        if missing:
            raise CheckpointError(
                f"reference gates are incomplete: {missing[:8]} missing of {num_layers} layers"
            )
        width, feature_size = found[0, "w1"].shape
        config = GateConfig(
            num_layers=num_layers,
            hidden_size=feature_size // 2,
            architecture="reference",
            gate_hidden_size=width,
            **config_fields,
        )
        with torch.device("meta"):
            stack = cls(config)
        tensors = {f"gates.{i}.{w}.weight": t.detach().clone() for (i, w), t in found.items()}
        _assign(stack, tensors, "the reference state dict")
        return stack


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[GateConfig, GateStack | None]:
    """Config and gates of a checkpoint folder (or hub id); no gates where it describes a fixed exit."""
    path = _local_folder(folder)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"no {CONFIG_FILE} in {path}: this is not a dyvte gates checkpoint (see `dyvte init`)"
        )
    config = GateConfig.from_json((path / CONFIG_FILE).read_text(encoding="utf-8"))
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        return config, None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is not a readable safetensors file: {error}") from error
    with torch.device("meta"):
        stack = GateStack(config)
    _assign(stack, tensors, str(weights))
    return config, stack


def save_config(config: GateConfig, folder: str | os.PathLike[str]) -> None:
    """Write `gate_config.json` alone: after calibration, or for a fixed exit without gates."""
    _write_atomically(Path(folder) / CONFIG_FILE, config.to_json().encode())


def prompt_features(hidden_BND: Tensor, prompt_mask_BN: Tensor) -> Tensor:
    """What a gate reads: [mean of the prompt text without its last token, its last token], (B, 2D) float32.

    A single prompt token is its own mean. A row without prompt text gives zeros: it must not be asked.
    Source: DyVTE, Eq. 1.
    """
    count_BN = prompt_mask_BN.cumsum(1)
    total_B1 = count_BN[:, -1:]
    last_BN = prompt_mask_BN & (count_BN == total_B1)
    before_BN = prompt_mask_BN & ((count_BN < total_B1) | (total_B1 == 1))
    weights_B2N = torch.stack([before_BN / before_BN.sum(1, keepdim=True).clamp(min=1), last_BN.float()], 1)
    # Where not a prompt token, the weight is 0, but 0 * inf would still be NaN.
    hidden_BND = hidden_BND.float().masked_fill(~prompt_mask_BN[..., None], 0.0)
    return torch.bmm(weights_B2N.to(hidden_BND.dtype), hidden_BND).flatten(1)


def uniform_offsets(num_layers: int) -> tuple[float, ...]:
    """Offsets that make all L exits equally likely at logit 0: -log(L-k) for k < L, and 0 for gate L."""
    return tuple(-math.log(num_layers - k) for k in range(1, num_layers)) + (0.0,)


def logit_threshold(threshold: float) -> float:
    """log(t / (1 - t)); infinite at the ends."""
    if threshold >= 1.0:
        return math.inf
    return math.log(threshold / (1.0 - threshold)) if threshold > 0.0 else -math.inf


def check_rule(
    num_layers: int | None, threshold: float, min_layer: int, fallback: int | None, mode: str = "gates"
) -> None:
    """Raise ConfigError where the settings of the decision rule make no sense; L may be unknown yet."""
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold {threshold}: expected a probability in 0..1")
    if min_layer < 1:
        raise ConfigError(
            f"min_layer {min_layer}: the first gate is gate 1; for exits before any layer use fixed(0)"
        )
    if mode not in ("gates", "fixed"):
        raise ConfigError(f"mode {mode!r}: expected 'gates' or 'fixed'")
    top = "L" if num_layers is None else str(num_layers)
    if fallback is not None and (fallback < 0 or (num_layers is not None and fallback > num_layers)):
        raise ConfigError(f"exit layer {fallback}: expected 0..{top} (the backbone has {top} decoder layers)")


class ExitRule:
    """The decision rule, one layer at a time; `exit_layers` and the runtime both go through it.

    A row leaves at the first k >= min_layer whose logit is strictly above log(t / (1 - t)). A logit that is
    not finite makes its row stop asking and leave at max(that layer, fallback); without a fallback: never.
    Gates 1..L-1 decide.
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        threshold: float,
        min_layer: int = 1,
        fallback: int | None = None,
    ) -> None:
        check_rule(num_layers, threshold, min_layer, fallback)
        self.cut = logit_threshold(threshold)
        self.num_layers = num_layers
        self.min_layer = min_layer
        self.fallback = num_layers if fallback is None else fallback
        self.exit_layers_B = torch.full((num_rows,), num_layers, dtype=torch.int64)
        self.asking_B = torch.ones(num_rows, dtype=torch.bool)
        self.fallback_B = torch.zeros(num_rows, dtype=torch.bool)

    def wants(self, k: int) -> bool:
        """Does any row still need gate k?"""
        return self.min_layer <= k < self.num_layers and bool(self.asking_B.any())

    def step(self, k: int, logits_B: Tensor) -> None:
        """Take in the logits (on CPU) of gate k."""
        broken_B = self.asking_B & ~torch.isfinite(logits_B)
        fires_B = self.asking_B & ~broken_B & (logits_B > self.cut)
        self.exit_layers_B[fires_B] = k
        self.exit_layers_B[broken_B] = max(k, self.fallback)
        self.fallback_B |= broken_B
        self.asking_B &= ~(broken_B | fires_B)


def exit_layers(
    logits_BL: Tensor, threshold: float, min_layer: int = 1, fallback: int | None = None
) -> Tensor:
    """(B,) int64 exit layers that the rule (`ExitRule`) draws from all gates' logits."""
    logits_BL = logits_BL.detach().cpu()
    rule = ExitRule(logits_BL.shape[0], logits_BL.shape[1], threshold, min_layer, fallback)
    for k in range(1, logits_BL.shape[1]):
        if rule.wants(k):
            rule.step(k, logits_BL[:, k - 1])
    return rule.exit_layers_B


def exit_probabilities(logits_BL: Tensor) -> Tensor:
    """(B, L) log P_k of leaving at k: h_k times the chance not to have left before; column L-1 is the rest.

    h_k = sigmoid(logit_k). All in log space; the logit of gate L is not read.
    """
    logits_BK = logits_BL[:, :-1]
    if logits_BL.dtype not in (torch.float32, torch.float64):
        logits_BK = logits_BK.float()
    log_stay_BK = F.logsigmoid(-logits_BK).cumsum(1)
    before_BL = F.pad(log_stay_BK, (1, 0))
    return before_BL + F.pad(F.logsigmoid(logits_BK), (0, 1))


def _assign(stack: GateStack, tensors: Mapping[str, Tensor], source: str) -> None:
    wanted = {name: tuple(t.shape) for name, t in stack.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != given:
        name = next(n for n in sorted(wanted.keys() | given.keys()) if wanted.get(n) != given.get(n))
        raise CheckpointError(
            f"{source} does not fit its config: {name} has shape {given.get(name, 'nothing')}, "
            f"expected {wanted.get(name, 'nothing')}"
        )
    stack.load_state_dict(dict(tensors), assign=True)


def _local_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.is_file() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise CheckpointError(f"no gates checkpoint folder at {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:
        raise CheckpointError(
            f"{folder} is neither a local folder nor a repository the hub gave: {error}"
        ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"cannot write to {path.parent}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
