"""How much earlier visual tokens may leave once an adapter was trained for it, and what that costs.

Trains on the training scenes with `dyvte train --lora` (and a control of the same steps that never sees an
exit), then judges on the test scenes: same answer and risk of every fixed exit against the un-adapted full
model, and accuracy of the full models. A run that was stopped goes on where it was.

    python experiments/lora_exit.py --output runs/lora-exit --docs docs
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dyvte.backbones import load_backbone  # noqa: E402
from dyvte.config import load_config  # noqa: E402
from dyvte.data import select_samples  # noqa: E402
from dyvte.distributed import Processes  # noqa: E402
from dyvte.progress import progress  # noqa: E402
from dyvte.runtime import VisualExit  # noqa: E402
from dyvte.teacher import Teacher, TeacherConfig, greedy_answers  # noqa: E402
from dyvte.training.config import TrainConfig  # noqa: E402
from dyvte.training.lora.labels import Labelled, label  # noqa: E402
from dyvte.training.lora.metrics import TARGETS, exit_columns, first_reaching  # noqa: E402

CONFIG = ROOT / "configs" / "embedded_lora.yaml"
RUNS = {
    "adapter": [],
    "control": ["--full_share", "1", "--set", "lora.loss=cross_entropy"],
}
TITLES = {
    "base": "without adapter",
    "adapter": "adapter, exits in training",
    "control": "adapter, same steps, no exits",
}


def main() -> None:
    """Train both, judge, write."""
    args = arguments()
    scenes = args.scenes / "instruct"
    if not (scenes / "test.json").is_file():
        if args.config.resolve() != CONFIG:
            raise SystemExit(
                f"error: {scenes}: no test.json there; write the scenes that {args.config} is for"
            )
        run("-m", "dyvte.data.scenes", "--output", str(args.scenes))
    seconds = {}
    for name, extra in RUNS.items():
        began = time.perf_counter()
        run(
            *("-m", "dyvte", "train", "--lora", "--config", str(args.config), "--report_to", "none"),
            *("--data_path", str(scenes / "train.json"), "--seed", str(args.seed)),
            *("--output_dir", str(args.output / name), "--trace_dir", str(args.output / "answers")),
            *extra, *shlex.split(args.extra),
        )  # fmt: skip
        seconds[name] = time.perf_counter() - began
    result = judge(args, scenes / "test.json")
    result |= {"seconds": seconds, "seed": args.seed, "torch": torch.__version__}
    for name in RUNS:
        summary = json.loads((args.output / name / "summary.json").read_text(encoding="utf-8"))
        result[name] = {
            key: summary[key]
            for key in ("steps", "global_batch", "parameters", "layers_adapted", "exits_trained")
        }
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = table(result)
    print(text)
    if args.docs is not None:
        (args.docs / "lora_exit.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot(result, args.docs / "lora_exit.png")
        rewrite(args.docs / "lora.md", text)


def judge(args: argparse.Namespace, path: Path) -> dict:
    """Test metrics of the backbone without an adapter and with each of them."""
    cfg = load_config(
        TrainConfig,
        args.config,
        [f"data.path={path}", f"data.limit={args.test}", "data.seed=1", "output_dir=."],
    )
    selection, alone = select_samples(cfg.data), Processes(0, 1, torch.device("cpu"))
    metrics = {}
    for name in TITLES:
        adapter = args.output / ("adapter" if name == "base" else name) / "adapter"
        model, processor = load_backbone(cfg.model.path, dtype=torch.float32, adapter=adapter)
        teacher = Teacher(model, processor, replace(cfg.teacher, reference="base"))
        with progress(len(selection.samples), name, "sample") as advance:
            quiet = {"file": str(path), "max_bad_samples": 0, "progress": advance}
            data = label(args.output / "test-answers", teacher, selection, alone, **quiet)
        columns = exit_columns(model, data, cfg.teacher, adapted=name != "base")
        same = columns["same_answer"].mean(0)
        if name == "base":
            with model.disable_adapter():
                right = accuracy(model, teacher, data, cfg.teacher)
        else:
            right = accuracy(model, teacher, data, cfg.teacher)
        risk = columns["risk"].mean(0)
        judged = [k for k, value in enumerate(risk.tolist()) if not math.isnan(value)]
        metrics[name] = {
            "exits": judged,
            "same_answer": same[judged].tolist(),
            "risk": risk[judged].tolist(),
            "first": {str(target): first_reaching(same, target) for target in TARGETS},
            "accuracy": right,
        }
    return {"num_test": len(selection.samples), "metrics": metrics}


def accuracy(model, teacher: Teacher, data: Labelled, cfg: TeacherConfig) -> float:
    """Share of test questions that the full model generates the right answer to."""
    tokenizer, right = teacher.processor.tokenizer, 0
    for start in range(0, len(data), cfg.batch_size):
        samples = data.samples[start : start + cfg.batch_size]
        with VisualExit()(model):
            inputs, answer_BN = greedy_answers(model, teacher.prepare(samples).inputs, cfg.max_new_tokens)
        for row, sample in enumerate(samples):
            said = tokenizer.decode(inputs["input_ids"][row][answer_BN[row]], skip_special_tokens=True)
            right += said.strip().lower() == sample.answer.strip().lower()
    return right / len(data)


def table(result: dict) -> str:
    """Markdown: every fixed exit, the first that reach the targets, accuracy."""
    metrics = result["metrics"]
    exits = metrics["base"]["exits"]
    head = "| exit layer | " + " | ".join(TITLES[name] for name in metrics)
    lines = [f"{head} | risk " + " | risk ".join(f"({TITLES[name]})" for name in metrics) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(metrics)))
    for i, k in enumerate(exits):
        same = " | ".join(f"{metrics[name]['same_answer'][i]:.1%}" for name in metrics)
        risk = " | ".join(f"{metrics[name]['risk'][i]:.4f}" for name in metrics)
        lines.append(f"| {k} | {same} | {risk} |")
    lines += [
        "",
        "| | " + " | ".join(TITLES[name] for name in metrics) + " |",
        "|" + "---|" * (1 + len(metrics)),
    ]
    for target in TARGETS:
        first = [metrics[name]["first"][str(target)] for name in metrics]
        lines.append(
            f"| first exit with same answer >= {target:.0%} | "
            + " | ".join(str(k) if k <= exits[-1] else "none" for k in first)
            + " |"
        )
    lines.append(
        "| accuracy of the full model | "
        + " | ".join(f"{metrics[name]['accuracy']:.1%}" for name in metrics)
        + " |"
    )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Same answer and risk over the exit layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, values in result["metrics"].items():
        layers = values["exits"]
        left.plot(layers, [100 * value for value in values["same_answer"]], marker="o", label=TITLES[name])
        right.plot(layers, [max(value, 1e-5) for value in values["risk"]], marker="o", label=TITLES[name])
    left.axhline(99, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="exit layer", ylabel="same answer as the un-adapted full model, %", ylim=(40, 101))
    right.set(xlabel="exit layer", ylabel="risk: KL(full || exit), nats", yscale="log")
    left.legend()
    figure.savefig(path, dpi=120)


def rewrite(path: Path, text: str) -> None:
    """Put the metrics between the marks of a document."""
    before, rest = path.read_text(encoding="utf-8").split("<!-- metrics -->\n")
    _, after = rest.split("<!-- /metrics -->")
    path.write_text(f"{before}<!-- metrics -->\n{text}\n<!-- /metrics -->{after}", encoding="utf-8")


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "lora-exit")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the training")
    parser.add_argument("--scenes", type=Path, default=ROOT / "data" / "scenes")
    parser.add_argument("--test", type=int, default=500, help="test questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="rewrite lora.md, lora_exit.json and lora_exit.png there")
    parser.add_argument("--extra", default="", help="options for dyvte train --lora, in quotes")
    args = parser.parse_args()
    args.output, args.scenes = args.output.resolve(), args.scenes.resolve()
    return args


if __name__ == "__main__":
    main()
