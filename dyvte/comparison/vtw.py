"""VTW's fixed layer for a comparison: by eta as published, or by an eta chosen on calibration samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyvte.calibration import gate_logits, search_exit_layer
from dyvte.calibration.path import Labels
from dyvte.comparison.config import CompareConfig
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.tuned_gates import TunedGates
from dyvte.data import open_conversations, select
from dyvte.evaluation.generation import Pipeline
from dyvte.teacher import Teacher, TeacherConfig, prepared_batches


@dataclass(frozen=True)
class VtwChoice:
    """VTW's K.

    Attributes
    ----------
    k : the first whose mean KL is at most ``eta``; None where none is.
    eta : the bound, nats.
    calibrated_k, calibrated_eta : where none is, the first K that keeps as many answers of the calibration
        samples as the gates do, and its KL; None where that is not needed, or no K does.
    kl : mean KL at every K.
    """

    k: int | None
    eta: float
    calibrated_k: int | None
    calibrated_eta: float | None
    kl: tuple[float, ...]

    def layers(self) -> list[int]:
        """The K to run."""
        return [k for k in (self.k, self.calibrated_k) if k is not None]


def choose_vtw(
    config: CompareConfig,
    pipeline: Pipeline,
    calibration: TracedScenes,
    gates: Sequence[TunedGates],
) -> VtwChoice:
    """VTW's K on calibration samples.

    Parameters
    ----------
    config : where the samples are, how many are used, and the bound.
    pipeline : the backbone.
    calibration : traced calibration samples, for an eta where none qualifies.
    gates : of every seed; their mean same-answer rate is what such an eta must keep.
    """
    selection = select(
        open_conversations(config.data_calibration, config.image_folder),
        limit=config.search_samples,
        seed=config.seed,
        max_bad_samples=config.max_bad_samples,
    )
    settings = TeacherConfig(
        template=config.template, batch_size=config.search_samples, max_new_tokens=config.max_new_tokens
    )
    batches = prepared_batches(
        Teacher(pipeline.model, pipeline.processor, settings),
        selection,
        file=str(config.data_calibration),
        max_bad_samples=config.max_bad_samples,
    )
    found = search_exit_layer(pipeline.model, (ready.inputs for ready in batches), eta=config.eta)
    kl = tuple(float(x) for x in found.kl)
    if found.k is not None:
        return VtwChoice(found.k, config.eta, None, None, kl)
    same_K = calibration.trace.same_answer.double().mean(0).tolist()
    kept = sum(_kept(one, calibration) for one in gates) / len(gates)
    enough = [k for k in range(1, calibration.num_layers) if same_K[k] >= kept]
    if not enough:
        return VtwChoice(None, config.eta, None, None, kl)
    return VtwChoice(None, config.eta, enough[0], kl[enough[0]], kl)


def _kept(gates: TunedGates, calibration: TracedScenes) -> float:
    """Same-answer rate of gates on the calibration samples at their stored threshold."""
    logits = gate_logits(gates.gates, calibration.trace, calibration.features)
    points = gates.operating_point(logits, calibration.trace.num_visual)
    return float(points.means_S(Labels.of(calibration.trace, "same_answer"))[0])
