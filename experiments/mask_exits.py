"""How masks of the embedded head depend on the exit layer, beside VTW's Table 7.

Asks a mini-ReasonSeg of test scenes under every fixed exit and under the shipped gates. A run that was
stopped goes on where it was.

    python experiments/mask_exits.py --work runs/mask-exits --docs docs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dyvte.backbones import BackboneConfig  # noqa: E402
from dyvte.data.scenes.segmentation import KINDS, write_reasonseg  # noqa: E402
from dyvte.evaluation.runner import EvalConfig, evaluate  # noqa: E402
from dyvte.plotting import new_figure, plain_axes  # noqa: E402
from dyvte.tasks.base import get_benchmark  # noqa: E402
from experiments.lora_exit import rewrite  # noqa: E402

FIRST_SCENE = 8_000_000
LAYERS = 10
TITLES = {"where": "Where is the star?", "color": "What color is the star?", "trail": "where arrows lead"}
VTW = (("LISA-7B", "32", "0.88", "0.94"), ("LISA-7B, K = 16", "16 of 32", "0.88", "0.94"))
VTW_13B = (("LISA-13B", "40", "0.95", "0.97"), ("LISA-13B, K = 20", "20 of 40", "0.95", "0.97"))
"""Table 7 of VTW (Lin et al., 2025), which does not say on what data: its appendix B."""


def main() -> None:
    args = arguments()
    data = args.work / "mini_reasonseg"
    if not data.is_dir():
        write_reasonseg(data, args.questions, FIRST_SCENE)
    config = EvalConfig(
        model=BackboneConfig(path=str(ROOT / "checkpoints/tiny-llava")),
        benchmark="reasonseg",
        data=data,
        output=args.work / "eval",
        policies=("never", *(f"fixed:{k}" for k in range(LAYERS)), f"gates:{args.gates}"),
        mask_head=str(args.head),
        question_suffix="",
        batch_size=50,
        max_new_tokens=8,
        timing_batches=0,
    )
    results = evaluate(config)
    benchmark = get_benchmark("reasonseg")
    questions = benchmark.load(data)
    kinds = np.array([KINDS[int(q.id) % len(KINDS)] for q in questions])
    draws = np.random.default_rng(0).multinomial(
        len(questions), np.full(len(questions), 1 / len(questions)), 2000
    )
    rows = []
    for result in results:
        answers = benchmark.read_predictions(result.folder / "predictions.jsonl", questions)
        areas = benchmark.areas(questions, answers)
        hits = np.array(benchmark.correct(questions, answers))
        ciou = benchmark.cumulative_statistic(questions, answers)(draws)
        rows.append(
            {
                "policy": result.name,
                "exit": result.scores.cost.mean_exit_layer,
                "visual_compute": result.scores.cost.visual_compute,
                "giou": result.scores.scores["giou"],
                "ciou": result.scores.scores["ciou"],
                "ciou_interval": np.quantile(ciou, (0.025, 0.975)).tolist(),
                "same_answer": result.scores.same_answer_as_never,
                "kinds": {k: _scores(areas[kinds == k], hits[kinds == k]) for k in KINDS},
            }
        )
    rows = [*sorted(rows[1:-1], key=lambda row: row["exit"]), rows[0], rows[-1]]
    text = table(rows, len(questions))
    print(text)
    (args.work / "result.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if args.docs is not None:
        plot(rows[:-1], rows[-1], args.docs / "mask_exits.png")
        rewrite(args.docs / "segmentation.md", text)


def _scores(areas: np.ndarray, hits: np.ndarray) -> dict[str, float]:
    shared, union = areas.sum(0)
    return {"giou": 100 * float(hits.mean()), "ciou": 100 * float(shared / (union + 1e-10))}


def table(rows: list[dict], questions: int) -> str:
    """Markdown: every exit, and the published figures."""
    lines = [
        f"{questions} questions about as many test scenes, a third of each kind; intervals of 95 % over",
        "images; the targets are the shapes' outlines under ReasonSeg's rule. Same answer: text and mask",
        "equal the full model's to the last pixel.",
        "",
        "| exit layer K | visual compute | gIoU | cIoU | "
        + " | ".join(f"cIoU, {TITLES[k]}" for k in KINDS)
        + " | same answer |",
        "|" + "---|" * (5 + len(KINDS)),
    ]
    for row in rows:
        low, high = row["ciou_interval"]
        name = {"never": f"{LAYERS} (never)"}.get(row["policy"], f"{row['exit']:.0f}")
        name = f"{row['exit']:.1f} (shipped gates)" if row["policy"].startswith("gates") else name
        ciou = f"{row['ciou']:.1f} [{low:.1f}, {high:.1f}]"
        same = "" if row["same_answer"] is None else f"{row['same_answer']:.1%}"
        lines.append(
            f"| {name} | {row['visual_compute']:.0%} | {row['giou']:.1f} | {ciou} | "
            + " | ".join(f"{row['kinds'][k]['ciou']:.1f}" for k in KINDS)
            + f" | {same} |"
        )
    lines += [
        "",
        "| published: VTW, Table 7 | layers that read the image | gIoU | cIoU |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in (*VTW, *VTW_13B)]
    return "\n".join([*lines, "", "![cIoU over the exit layer](mask_exits.png)"])


def plot(rows: list[dict], gates: dict, path: Path) -> None:
    """cIoU over the share of layers that read the image."""
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    shares = [row["exit"] / LAYERS for row in rows]
    low, high = zip(*(row["ciou_interval"] for row in rows), strict=True)
    axes.fill_between(shares, low, high, alpha=0.2)
    axes.plot(shares, [row["ciou"] for row in rows], marker="o", label="embedded, all questions")
    for kind in KINDS:
        values = [row["kinds"][kind]["ciou"] for row in rows]
        axes.plot(shares, values, linewidth=1, linestyle="--", label=TITLES[kind])
    axes.plot(gates["exit"] / LAYERS, gates["ciou"], "k*", markersize=11, label="shipped gates (mean exit)")
    axes.plot([0.5, 1], [94, 94], "s", color="grey", label="published: LISA-7B, VTW K = 16 and full")
    axes.plot([0.5, 1], [97, 97], "D", color="grey", label="published: LISA-13B, VTW K = 20 and full")
    axes.set(xlabel="share of decoder layers that read the image (K / L)", ylabel="cIoU, %", ylim=(0, 100))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.95))
    plain_axes(axes)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mask-exits")
    parser.add_argument("--head", type=Path, default=ROOT / "checkpoints" / "tiny-llava-masks")
    parser.add_argument("--gates", type=Path, default=ROOT / "checkpoints" / "tiny-llava-gates")
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--docs", type=Path, help="rewrite segmentation.md and mask_exits.png there")
    args = parser.parse_args()
    args.work = args.work.resolve()
    return args


if __name__ == "__main__":
    main()
