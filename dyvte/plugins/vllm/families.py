"""vLLM's models, with visual tokens that freeze and leave: one small class for each architecture.

vLLM imports this module, by the names in `dyvte.plugins.vllm.names`, where a model is loaded or looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from dyvte.plugins.vllm.driver import Driver
from dyvte.plugins.vllm.loading import check_identity, make_driver
from dyvte.plugins.vllm.reports import Schedule


class Scheduled(nn.Module):
    """What comes before a model of vLLM: its forward, where a step freezes nothing and lets nothing go; ours
    over the same layers, where it does."""

    visual_exits: Driver | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.visual_exits = make_driver(self, vllm_config)
        self._vllm_config = vllm_config

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's."""
        arguments = (input_ids, positions, intermediate_tensors, inputs_embeds)
        driver = self.visual_exits
        step = driver.step() if driver is not None and inputs_embeds is not None else None
        if driver is None or step is None:
            return super().forward(*arguments, **kwargs)
        if not driver.in_place(step):
            return driver.run(step, positions, inputs_embeds, self.behind_layers(inputs_embeds))
        with driver.metadata(step):
            return super().forward(*arguments, **kwargs)

    def behind_layers(self, inputs_embeds: Tensor) -> Sequence[Tensor]:
        """What this model adds behind its first layers, one (rows, D) tensor for each of them."""
        return ()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's; then the gates' backbone is compared, while the weights are still there as they are."""
        loaded = super().load_weights(self._as_vllm_names(weights))
        if self.visual_exits is not None:
            for writer in self.visual_exits.writers:
                writer.keep_projection()
            check_identity(self, self._vllm_config)
        return loaded

    def visual_schedules(self) -> list[Schedule]:
        """What was decided for the last prompts with visual tokens, oldest first."""
        return [] if self.visual_exits is None else list(self.visual_exits.reports.schedules)

    def _as_vllm_names(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Newer versions of transformers save a CLIP tower without the module that vLLM's still has."""
        tower = getattr(self, "vision_tower", None)
        if not hasattr(tower, "vision_model"):
            return weights
        return ((_with_vision_model(name), tensor) for name, tensor in weights)


class DyvteLlavaForConditionalGeneration(Scheduled, LlavaForConditionalGeneration):
    """LLaVA-1.5 and what is built like it."""


class DyvteLlavaNextForConditionalGeneration(Scheduled, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT; the line breaks between an image's rows are visual tokens."""


class DyvteQwen2VLForConditionalGeneration(Scheduled, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class DyvteQwen2_5_VLForConditionalGeneration(Scheduled, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class DyvteQwen3VLForConditionalGeneration(Scheduled, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: vision features are added again behind the first layers (deepstack), to frozen tokens too."""

    def behind_layers(self, inputs_embeds: Tensor) -> Sequence[Tensor]:
        """The features that `embed_input_ids` has left for this step; zeros at text."""
        number = len(inputs_embeds)
        given = self._get_deepstack_input_embeds(number)
        if given is None:
            return ()
        # copies: what lies there is cleared for the next step
        found = [
            given[f"deepstack_input_embeds_{index}"].clone() for index in range(self.deepstack_num_level)
        ]
        self._clear_deepstack_input_embeds(number)
        return found


class DyvteInternVLForConditionalGeneration(Scheduled, InternS1ForConditionalGeneration):
    """InternVL in transformers' form."""


def _with_vision_model(name: str) -> str:
    before, tower, after = name.partition("vision_tower.")
    return name if not tower or after.startswith("vision_model.") else f"{before}{tower}vision_model.{after}"
