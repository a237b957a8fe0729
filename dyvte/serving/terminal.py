"""What the terminal shows of an answer: its layers in one line, and a bar of their depth."""

from __future__ import annotations

from dyvte.serving.asking import FullAnswer
from dyvte.serving.jobs import ExitReport

UPDATED, READ, GONE = "█", "▒", "·"


def depth_bar(report: ExitReport) -> str:
    """One sign for each decoder layer: visual tokens updated, read, or gone; empty without an image."""
    if report.exit_layer < 0:
        return ""
    frozen = report.exit_layer - report.freeze_layer
    gone = report.num_layers - report.exit_layer
    return UPDATED * report.freeze_layer + READ * frozen + GONE * gone


def layers_line(answer: FullAnswer) -> str:
    """Schedule, layers, what they cost, and the time to the first token."""
    report = answer.report
    parts = [report.schedule]
    if report.exit_layer < 0:
        parts.append("no image")
    else:
        layers = f"{report.visual_tokens} visual tokens left after layer {report.exit_layer} of"
        if report.exit_layer == report.num_layers:
            layers = f"{report.visual_tokens} visual tokens stayed through all"
        parts.append(f"{layers} {report.num_layers} {depth_bar(report)}")
        if report.freeze_layer < report.exit_layer:
            parts.append(f"frozen after layer {report.freeze_layer}")
        parts.append(f"visual compute {report.visual_compute:.1%}")
    parts += [f"KV {report.kv_bytes / 1024:.0f} KiB", f"first token {1000 * answer.first_token:.0f} ms"]
    if report.certified is not None:
        alpha, delta = report.certified["alpha"], report.certified["delta"]
        whose = "" if report.certified["group"] is None else f"group {report.certified['group']}, "
        parts.append(f"certified: {whose}mean {report.certified['loss']} loss <= {alpha:g} (delta {delta:g})")
    elif report.not_certified is not None:
        parts.append(f"not certified: {report.not_certified}")
    return " | ".join(parts)
