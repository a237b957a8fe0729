"""Exit-aware distillation: the adapted model behind an exit learns what the full one says without an adapter.

Both run here: the teacher is the same model with the adapter switched off and no exit, the student the model
with its adapter inside :class:`~dyvte.runtime.VisualExit`, so that what leaves is really not computed.

Shape letters: B rows, N tokens, A predicted positions, V vocabulary, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import describe
from dyvte.distributed import Processes
from dyvte.policies import OraclePolicy
from dyvte.runtime import VisualExit
from dyvte.teacher import kl_divergence
from dyvte.teacher.exits import positions_before
from dyvte.teacher.plain import predicted_logits
from dyvte.training.config import TrainConfig
from dyvte.training.loop import Training
from dyvte.training.lora.labels import Labelled
from dyvte.training.lora.metrics import exit_columns, first_reaching
from dyvte.training.lora.model import trainable
from dyvte.training.schedule import drawn_exits, seed_of


class _Adapter(nn.Module):
    """What the engine holds: the adapter's parameters alone.

    The frozen backbone is kept out of its sight, so that checkpoints hold the adapter and nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ParameterList(trainable(model))
        self._unregistered = (model,)

    def forward(self, inputs: Mapping[str, Any], predict_BN: Tensor) -> Tensor:
        return predicted_logits(self._unregistered[0], inputs, predict_BN)[0]


class LoraTraining(Training):
    """One training of one adapter; :meth:`run` does it."""

    trained = "adapters"

    def __init__(
        self, cfg: TrainConfig, model: Any, train: Labelled, validation: Labelled | None, processes: Processes
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.validates = validation is not None
        self.backbone = describe(model)
        self.exits = cfg.lora.exits(self.backbone.num_layers)
        self._dropouts = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and "lora_dropout" in name
        ]
        if cfg.lora.gradient_checkpointing:
            base = self.backbone.model
            # transformers 5.23 renamed it.
            enable = (
                getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        super().__init__(cfg, _Adapter(model), len(train), processes)

    @contextmanager
    def micro_step(self, step: int, micro: int) -> Iterator[tuple[Tensor, Sequence[str]]]:
        """The distillation loss of one batch, each row behind an exit of its own."""
        inputs, answer_BN, ids = self.train.inputs(self.drawn(step, micro).tolist())
        predict_BN = positions_before(answer_BN, ids)
        with torch.no_grad(), self.model.disable_adapter():
            full_BAV, valid_BA = predicted_logits(self.model, inputs, predict_BN)
        policy = OraclePolicy(self.drawn_exits(step, micro))
        with VisualExit.from_policy(policy)(self.model), self._training_mode(step, micro):
            exit_BAV = self.engine(inputs, predict_BN)
            labels_BA = torch.zeros_like(valid_BA, dtype=torch.long)
            labels_BA[valid_BA] = inputs["input_ids"][answer_BN]
            yield distillation_loss(exit_BAV, full_BAV, labels_BA, valid_BA, self.cfg.lora.loss), ids

    def drawn_exits(self, step: int, micro: int) -> Tensor:
        """(B,) exit layer of each row of this process's micro-step, a function of seed and step alone."""
        first, last = self.exits
        exits = drawn_exits(
            self.cfg.seed,
            step,
            self.size.global_batch,
            first=first,
            last=last,
            full=self.backbone.num_layers,
            full_share=self.cfg.lora.full_share,
        )
        start = self.position(step, micro) - step * self.size.global_batch
        return exits[start : start + self.cfg.batch_size]

    def validate(self) -> dict[str, Any]:
        """Every exit of the adapted model against the un-adapted full one, on the held-out samples."""
        columns = exit_columns(self.model, self.validation, self.cfg.teacher)
        first, last = self.exits
        risk, same = columns["risk"].mean(0), columns["same_answer"].mean(0)
        judged = [k for k, value in enumerate(risk.tolist()) if not math.isnan(value)]
        drawn = [k for k in judged if first <= k <= last] or judged
        return {
            "validation/risk": float(risk[drawn].mean()),
            "validation/same_answer": float(same[drawn].mean()),
            "validation/full_same_answer": float(same[-1]),
            "validation/first_exit_99": first_reaching(same, 0.99),
            "validation/exits": judged,
            "validation/risk_at": risk[judged].tolist(),
            "validation/same_answer_at": same[judged].tolist(),
        }

    @contextmanager
    def _training_mode(self, step: int, micro: int) -> Iterator[None]:
        """Dropout of the adapters (drawn from seed and step) and checkpointing; the backbone stays in eval
        mode."""
        switched: list[nn.Module] = list(self._dropouts)
        if self.cfg.lora.gradient_checkpointing:
            # The layer's own flag only: dropout inside the backbone stays off.
            switched += list(self.backbone.layers)
        index = self.position(step, micro)
        devices = [self.processes.device] if self.processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(self.cfg.seed, 5, index))
            for module in switched:
                module.training = True
            try:
                yield
            finally:
                for module in switched:
                    module.training = False


def distillation_loss(
    exit_BAV: Tensor, full_BAV: Tensor, labels_BA: Tensor, valid_BA: Tensor, kind: str
) -> Tensor:
    """Mean over rows of the mean over answer positions, in nats.

    Parameters
    ----------
    kind:
        "kl": KL(full || exit), ``risk``; "cross_entropy": of the label tokens.
    """
    exit_BAV = exit_BAV.float().log_softmax(-1)
    if kind == "kl":
        values_BA = kl_divergence(full_BAV.float().log_softmax(-1), exit_BAV)
    else:
        values_BA = -exit_BAV.gather(-1, labels_BA[..., None]).squeeze(-1)
    return (values_BA.masked_fill(~valid_BA, 0).sum(1) / valid_BA.sum(1)).mean()
