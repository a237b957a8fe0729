"""What tells calibrated groups apart, fitted on images of its own: projection, centres and the guard's limit.

Shapes: B samples, R those it is fitted on, F gate features, Z projected dimensions, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import CalibrationError
from dyvte.gates import GroupFinder
from dyvte.teacher.trace import Trace

SIZE = 32
"""Dimensions that features are projected to, at most."""
SHRINKAGE = 0.05
"""Share of the identity in the covariance that groups have in common."""
_KMEANS_ROUNDS = 50


@dataclass(frozen=True)
class Parts:
    """Rows of the samples by what their images are for: fitting, the guard's limit, testing."""

    fit: Tensor
    limit: Tensor
    test: Tensor

    @staticmethod
    def of(image_ids: Sequence[str], share: float, seed: int) -> Parts:
        """Images in a random order: two thirds of ``share`` fit, one third limits, the rest tests.

        Parameters
        ----------
        image_ids
            Of the B samples.
        share
            Of the images.
        seed
            Of the order.

        Raises
        ------
        CalibrationError
            If a part would have no image.
        """
        images = list(dict.fromkeys(image_ids))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        first, second = round(2 / 3 * share * len(images)), round(share * len(images))
        if not 0 < first < second < len(images):
            raise CalibrationError(f"{len(images)} images cannot be divided to fit, guard and test groups")
        place = {images[image]: n for n, image in enumerate(order)}
        places_B = torch.tensor([place[image] for image in image_ids])
        where = (places_B < first, (places_B >= first) & (places_B < second), places_B >= second)
        return Parts(*(mask_B.nonzero().flatten() for mask_B in where))


def features_after(trace: Trace, layer: int) -> Tensor:
    """(B, F) gate features of the plain stream after ``layer`` layers; 0: of the embeddings.

    Raises
    ------
    CalibrationError
        If the trace does not hold them.
    """
    if not 0 <= layer < trace.num_layers:
        raise CalibrationError(f"groups after layer {layer}: expected 0..{trace.num_layers - 1}")
    if layer:
        return trace.features[:, layer - 1].float()
    if trace.grid is None:
        raise CalibrationError(
            "these traces hold no features of the embeddings (those with freeze layers do): tell groups "
            "after layer 1 or later"
        )
    return trace.grid.embeddings.float()


def fit_finder(
    features_BF: Tensor,
    parts: Parts,
    labels_B: Sequence[str] | int,
    image_ids: Sequence[str],
    guard: float,
    seed: int = 0,
) -> tuple[tuple[str, ...], GroupFinder]:
    """Names of the groups, and what tells them.

    Parameters
    ----------
    features_BF
        Of all samples.
    parts
        What is fitted on which.
    labels_B
        Group of every sample, or a number of clusters.
    image_ids
        Of the samples.
    guard
        See `Grouping`.
    seed
        Of clusters, and of which question stands for each reference image.

    Raises
    ------
    CalibrationError
        If no group has two samples to be fitted on.
    """
    mean_F = features_BF[parts.fit].mean(0)
    _, sizes_Z, axes_ZF = torch.linalg.svd((features_BF[parts.fit] - mean_F).double(), full_matrices=False)
    kept = min(SIZE, int((sizes_Z > 1e-3 * sizes_Z[0]).sum()))
    axes_FZ = axes_ZF[:kept].T
    plain_RZ = (features_BF[parts.fit] - mean_F).double() @ axes_FZ
    if isinstance(labels_B, int):
        labels_R = [f"cluster {c}" for c in _clusters(plain_RZ, labels_B, seed).tolist()]
    else:
        labels_R = [labels_B[row] for row in parts.fit.tolist()]
    names = tuple(sorted({name for name in labels_R if labels_R.count(name) > 1}, key=_by_number))
    if not names:
        raise CalibrationError("no group has two samples among the images that groups are fitted on")
    index_R = torch.tensor([names.index(name) if name in names else -1 for name in labels_R])
    means_GZ = torch.stack([plain_RZ[index_R == g].mean(0) for g in range(len(names))])
    inside_RZ = (plain_RZ - means_GZ[index_R.clamp(min=0)])[index_R >= 0]
    spread_ZZ = inside_RZ.T @ inside_RZ / max(1, len(inside_RZ) - len(names))
    even = spread_ZZ.diagonal().mean().clamp(min=1e-12)
    spread_ZZ = (1 - SHRINKAGE) * spread_ZZ + SHRINKAGE * even * torch.eye(kept, dtype=torch.float64)
    values_Z, vectors_ZZ = torch.linalg.eigh(spread_ZZ)
    white_ZZ = vectors_ZZ / values_Z.sqrt()
    finder = GroupFinder(
        mean_F=mean_F,
        projection_FZ=(axes_FZ @ white_ZZ).float(),
        centers_GZ=(means_GZ @ white_ZZ).float(),
        limit=torch.tensor(torch.inf),
        reference_IZ=torch.zeros(0, kept),
    )
    finder.limit = conformal_limit(finder.find(features_BF[parts.limit]).distances_B, guard)
    reference = one_of_each([image_ids[row] for row in parts.test.tolist()], seed)
    finder.reference_IZ = finder.find(features_BF[parts.test][reference]).projected_BZ
    return names, finder


def conformal_limit(distances_B: Tensor, guard: float) -> Tensor:
    """() the distance that at most ``guard`` of further rows of the same kind exceed, on average over draws.

    The ceil((1 - guard)(n + 1))-th smallest of n; infinite where there are too few, or without guard (split
    conformal prediction, Vovk et al. 2005).

    Parameters
    ----------
    distances_B
        Of rows that the finder was not fitted on.
    guard
        The share.
    """
    place = math.ceil((1 - guard) * (len(distances_B) + 1) - 1e-9)
    if guard <= 0 or place > len(distances_B):
        return torch.tensor(torch.inf)
    return distances_B.sort().values[place - 1].clone()


def one_of_each(image_ids: Sequence[str], seed: int) -> list[int]:
    """Rows, one of each image, drawn at random: independent where images are.

    Parameters
    ----------
    image_ids
        Of the rows.
    seed
        Of the draw.
    """
    order = torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(seed)).tolist()
    first: dict[str, int] = {}
    for row in order:
        first.setdefault(image_ids[row], row)
    return sorted(first.values())


def _clusters(plain_RZ: Tensor, count: int, seed: int) -> Tensor:
    """(R,) k-means, started from rows drawn far from one another (k-means++)."""
    if count > len(plain_RZ):
        raise CalibrationError(f"{count} clusters of {len(plain_RZ)} samples")
    generator = torch.Generator().manual_seed(seed)
    centers = plain_RZ[torch.randint(len(plain_RZ), (1,), generator=generator)]
    for _ in range(count - 1):
        nearest_R = torch.cdist(plain_RZ, centers).square().min(1).values
        if not bool(nearest_R.sum() > 0):
            break  # fewer different rows than clusters
        drawn = torch.multinomial(nearest_R, 1, generator=generator)
        centers = torch.cat((centers, plain_RZ[drawn]))
    for _ in range(_KMEANS_ROUNDS):
        own_R = torch.cdist(plain_RZ, centers).argmin(1)
        moved = torch.stack(
            [
                plain_RZ[own_R == c].mean(0) if bool((own_R == c).any()) else centers[c]
                for c in range(len(centers))
            ]
        )
        if torch.equal(moved, centers):
            break
        centers = moved
    return own_R


def _by_number(name: str) -> tuple[str, int]:
    head, _, tail = name.rpartition(" ")
    return (head, int(tail)) if tail.isdigit() else (name, -1)


def _by_number(name: str) -> tuple[str, int]:
    head, _, tail = name.rpartition(" ")
    return (head, int(tail)) if tail.isdigit() else (name, -1)
