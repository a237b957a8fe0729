"""Gates of DyVTE's published rule, trained as published and in a stronger form, to be compared with."""

from __future__ import annotations

from pathlib import Path

from workbench import Workbench, hidden_size

from dyvte.comparison.scenes import TracedScenes

REFERENCE = "objective.name=reference_label"


def reference_rules(bench: Workbench, calibration: TracedScenes) -> dict[str, list[Path]]:
    """The published rule on the data's answers: its own schedule and shape, and a stronger variant.

    The published rule leaves where p > 0.5; here its threshold is swept as ours is, which is its strongest
    form. Its learning rate is the better of two, by mean risk on the calibration scenes; the variant has
    that of the configuration.
    """
    exits_alone = ("teacher.freeze_layers=[]", "gates.freeze_head=false")
    once = ("target.alpha=null", "target.budget=null")
    data = ("teacher.label_source=data", *exits_alone, *once)
    width = hidden_size(bench.traces("train", *data, name="train-data")) // 2  # 2048 of 4096
    own = (REFERENCE, "objective.one_layer_per_step=true", "gates.architecture=reference")
    variants = {
        "reference rule": ((1e-3, 5e-3), (*data, *own, f"gates.hidden_size={width}")),
        "reference rule, all layers, compact": (
            (bench.settings().optimizer.learning_rate,),
            (*data, REFERENCE, "gates.architecture=compact"),
        ),
    }
    rules = {}
    for name, (rates, overrides) in variants.items():
        stem = name.replace(", ", "-").replace(" ", "-")
        tried = {f"{stem}-{rate:g}": (*overrides, f"optimizer.learning_rate={rate}") for rate in rates}
        best = bench.best(tried, calibration, trace="train-data")
        print(f"[reference] {name}: {best.label}", flush=True)
        rules[name] = best.folders
    return rules
