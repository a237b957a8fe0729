"""The plot of VTW's search: mean KL over K."""

from __future__ import annotations

import os
from pathlib import Path

from dyvte.calibration.vtw import LayerSearch
from dyvte.errors import ConfigError
from dyvte.plotting import log_axis_with_zero, new_figure

SUFFIXES = (".png", ".svg")


def check_plot(path: str | os.PathLike[str]) -> None:
    """See that a plot can be written to this file, before the work that it will show.

    Parameters
    ----------
    path
        Of the file to be written.

    Raises
    ------
    ConfigError
        If the ending is neither png nor svg, the folder does not exist, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot {path}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot {path}: the folder {path.parent} does not exist")
    new_figure(1, 1)


def plot_search(found: LayerSearch, path: str | os.PathLike[str]) -> None:
    """Draw the curve, the bound and the chosen K into a png or svg file; raises as `check_plot` does.

    Parameters
    ----------
    found
        What is drawn.
    path
        Its ending says the format.
    """
    check_plot(path)
    figure = new_figure(5.6, 3.8)
    axes = figure.subplots()
    layers, kl = range(len(found.kl)), found.kl.tolist()
    axes.axvspan(found.k_range[0] - 0.5, found.k_range[1] + 0.5, color="#eeeeee", label="K searched")
    axes.plot(layers, kl, "o-", ms=3.5, lw=1.2, color="#4d4d4d", label=f"mean KL({found.direction})")
    axes.axhline(found.eta, color="#d62728", lw=1, ls="--", label=f"eta = {found.eta:g}")
    if found.k is not None:
        axes.plot(found.k, kl[found.k], "*", ms=13, color="#d62728", label=f"K = {found.k}")
    log_axis_with_zero(axes, max(found.eta / 10, 1e-6))
    axes.set_xlabel("K: decoder layers that see the image")
    axes.set_ylabel("nats")
    title = "none qualifies" if found.k is None else f"K = {found.k} of {len(kl) - 1}"
    axes.set_title(f"{title}; {found.num_samples} samples, positions: {found.positions}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
