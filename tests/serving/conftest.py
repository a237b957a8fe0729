"""A tiny random backbone with gates whose rows leave at different layers, ready to be asked."""

from __future__ import annotations

import httpx
import pytest
import torch

from dyvte.backbones import get_template
from dyvte.evaluation.generation import Pipeline
from dyvte.gates import GateConfig, GateStack
from dyvte.runtime.image_store import ImageStore
from dyvte.serving.answerer import Answerer
from tests.helpers.models import tiny_llava
from tests.helpers.served import serving

LAYERS, HIDDEN = 4, 32


@pytest.fixture(scope="package")
def pipeline() -> Pipeline:
    """The model and its processor; some words end its answers."""
    model, processor = tiny_llava(LAYERS)
    model.generation_config.eos_token_id = [2, 31, 34]
    return Pipeline(model, processor, get_template("auto", processor), max_new_tokens=8)


@pytest.fixture(scope="package")
def gates_folder(tmp_path_factory: pytest.TempPathFactory):
    """Random gates, calibrated at alpha 0.05."""
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        architecture="compact",
        calibration={
            "kind": "risk",
            "certified": True,
            "alpha": 0.05,
            "delta": 0.1,
            "loss": "same_answer",
            "visual_compute": 0.6,
            "bounds": [{"alpha": 0.2, "delta": 0.1, "loss": "same_answer", "threshold": 0.3}],
            "budgets": [{"budget": 0.7, "threshold": 0.9}, {"budget": 0.3, "threshold": 0.2}],
        },
    )
    gates = GateStack.init(config, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    folder = tmp_path_factory.mktemp("serving") / "gates"
    gates.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def answerer(pipeline: Pipeline, gates_folder) -> Answerer:
    """Gates decide unless a request says otherwise; images are kept."""
    return Answerer.of(pipeline, f"gates:{gates_folder}", images=ImageStore())


@pytest.fixture(scope="package")
def served(answerer: Answerer):
    """A server of that answerer."""
    with serving(answerer, max_rows=8, max_image_mb=1, max_megapixels=1, max_body_mb=4) as running:
        yield running


@pytest.fixture(scope="package")
def http_client():
    """A client that waits."""
    with httpx.Client(timeout=120) as client:
        yield client
