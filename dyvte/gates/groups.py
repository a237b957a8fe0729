"""Thresholds by group: each row is told which calibrated group it is of, or that it is like none.

A group is what rows have in common that calibration saw: a question type, or a cluster of gate features. The
finder is linear: features are projected to Z dimensions in which every group has unit covariance, a row is of
the group whose centre is nearest, and of none where even that is further away than all but a stated share of
calibration's rows (the Mahalanobis detector of Lee et al. 2018, arXiv 1807.03888).

Shapes: B rows, F gate features, Z projected dimensions, G groups, I calibration images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates.rule import ScheduleRule, cut

UNLIKE = -1
"""Group of a row that is like none."""
NOT_ASKED = -2
"""Group of a row that nobody asked: no image, or no prompt text after it."""
NEVER = 1.0


@dataclass(frozen=True, kw_only=True)
class GroupThresholds:
    """The decision rule of each group; a part of `gate_config.json`.

    Attributes
    ----------
    layer
        Layers behind the features that tell a row's group: 0 reads the embeddings. No row freezes or leaves
        before.
    names
        Of the G groups.
    thresholds
        Of exiting, one for each group; 1 is never, for a group without a certificate.
    freeze_thresholds
        Of freezing, one for each; empty without a freeze head.
    finder
        `GroupFinder.digest` of what tells these groups; empty: not known.
    """

    layer: int
    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    freeze_thresholds: tuple[float, ...] = ()
    finder: str = ""

    def __post_init__(self) -> None:
        for name in ("names", "thresholds", "freeze_thresholds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.layer < 0 or not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"groups after layer {self.layer} named {list(self.names)}: expected a layer of 0 or more, "
                "and at least one name, none twice"
            )
        for name in ("thresholds", "freeze_thresholds"):
            values = getattr(self, name)
            wrong = len(values) != len(self.names) and (name == "thresholds" or values)
            if wrong or not all(0.0 <= one <= 1.0 for one in values):
                raise ConfigError(
                    f"{name} of {len(self.names)} groups: expected a probability for each, found {values}"
                )

    def check(self, num_layers: int, freeze_head: bool) -> None:
        """Raise ConfigError where this does not fit the gates.

        Parameters
        ----------
        num_layers
            L.
        freeze_head
            Have the gates one?

        Raises
        ------
        ConfigError
            If the layer is none of theirs, or freeze thresholds are there without a head, or missing.
        """
        if self.layer >= num_layers:
            raise ConfigError(f"groups are found after layer {self.layer}: expected 0..{num_layers - 1}")
        if freeze_head != bool(self.freeze_thresholds):
            raise ConfigError("freeze_thresholds of groups belong to gates with freeze_head: true, and there")

    def of(self, name: str) -> tuple[float, float | None]:
        """Exit and freeze threshold of a group by its name.

        Parameters
        ----------
        name
            Of the group.

        Raises
        ------
        ConfigError
            If there is no such group.
        """
        if name not in self.names:
            raise ConfigError(f"no calibrated group {name!r}; there are: {', '.join(self.names)}")
        index = self.names.index(name)
        return self.thresholds[index], self.freeze_thresholds[index] if self.freeze_thresholds else None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> GroupThresholds:
        """Inverse of `dataclasses.asdict`.

        Parameters
        ----------
        values
            Of all fields, by name.

        Raises
        ------
        CheckpointError
            If a field is missing, unknown or of another kind.
        """
        try:
            return GroupThresholds(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the groups of gate_config.json are not readable: {error}") from error


@dataclass(frozen=True, kw_only=True)
class FoundGroups:
    """What the finder says of some rows, on its device.

    Attributes
    ----------
    groups_B
        (B,) int64 indices; `UNLIKE` where a row is like none.
    distances_B
        (B,) float32 squared distance to the nearest centre; the limit is the finder's.
    projected_BZ
        (B, Z) float32, what a test of two samples looks at.
    """

    groups_B: Tensor
    distances_B: Tensor
    projected_BZ: Tensor

    def packed(self) -> Tensor:
        """(2 + Z, B) float32: one tensor, which crosses to the CPU at once."""
        return torch.cat((self.groups_B.float()[None], self.distances_B[None], self.projected_BZ.T))

    @staticmethod
    def unpacked(packed: Tensor) -> FoundGroups:
        """Inverse of `packed`.

        Parameters
        ----------
        packed
            (2 + Z, B).
        """
        return FoundGroups(
            groups_B=packed[0].nan_to_num(nan=UNLIKE).long(),
            distances_B=packed[1],
            projected_BZ=packed[2:].T,
        )

    @staticmethod
    def none(num_rows: int, size: int) -> FoundGroups:
        """Of rows that nobody asked.

        Parameters
        ----------
        num_rows
            B.
        size
            Z.
        """
        return FoundGroups(
            groups_B=torch.full((num_rows,), NOT_ASKED, dtype=torch.int64),
            distances_B=torch.full((num_rows,), torch.nan),
            projected_BZ=torch.full((num_rows, size), torch.nan),
        )


class GroupFinder:
    """Tells rows' groups by their gate features after one layer.

    Parameters
    ----------
    mean_F, projection_FZ
        What is subtracted from features, and what they are multiplied by then.
    centers_GZ
        Of the groups, in the projected space.
    limit
        () squared distance; beyond it a row is like no group. Infinite: all rows are like one.
    reference_IZ
        Projected features of calibration's questions, one of each image, that took no part in fitting any of
        the above: the sample that later questions are held against.
    """

    NAMES = ("mean_F", "projection_FZ", "centers_GZ", "limit", "reference_IZ")

    def __init__(
        self, mean_F: Tensor, projection_FZ: Tensor, centers_GZ: Tensor, limit: Tensor, reference_IZ: Tensor
    ) -> None:
        self.mean_F, self.projection_FZ, self.centers_GZ = mean_F, projection_FZ, centers_GZ
        self.limit, self.reference_IZ = limit, reference_IZ

    @property
    def size(self) -> int:
        """Z."""
        return self.projection_FZ.shape[1]

    def find(self, features_BF: Tensor) -> FoundGroups:
        """Groups of rows; a row with a feature that is not finite is like none.

        Parameters
        ----------
        features_BF
            What the gates read after the groups' layer.
        """
        self._to(features_BF.device)
        projected_BZ = (features_BF.float() - self.mean_F) @ self.projection_FZ
        distances_BG = (projected_BZ[:, None] - self.centers_GZ).square().sum(-1)
        distances_B, groups_B = distances_BG.min(1)
        like_B = distances_B <= self.limit  # False for nan
        return FoundGroups(
            groups_B=torch.where(like_B, groups_B, UNLIKE),
            distances_B=distances_B,
            projected_BZ=projected_BZ,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def digest(self) -> str:
        """sha256 over all of it: thresholds hold for the groups that this very finder tells."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], feature_size: int, num_groups: int) -> GroupFinder:
        """From tensors by name.

        Parameters
        ----------
        tensors
            As `tensors` gives them.
        feature_size
            F of the gates.
        num_groups
            G.

        Raises
        ------
        CheckpointError
            If one is missing, or shapes do not fit.
        """
        if sorted(tensors) != sorted(cls.NAMES):
            raise CheckpointError(f"the finder of groups has tensors {sorted(tensors)}, not {cls.NAMES}")
        # Copies, as those read from a file may lie unaligned, which changes the last bits of a product.
        found = {name: tensor.float().clone() for name, tensor in tensors.items()}
        size = found["projection_FZ"].shape[-1]
        wanted = {
            "mean_F": (feature_size,),
            "projection_FZ": (feature_size, size),
            "centers_GZ": (num_groups, size),
            "limit": (),
            "reference_IZ": (found["reference_IZ"].shape[0] if found["reference_IZ"].dim() else 0, size),
        }
        for name, shape in wanted.items():
            if tuple(found[name].shape) != shape:
                raise CheckpointError(
                    f"the finder of groups: {name} has shape {tuple(found[name].shape)}, expected {shape}"
                )
        return cls(**found)

    def _to(self, device: torch.device) -> None:
        if self.mean_F.device != device:
            for name in self.NAMES:
                setattr(self, name, getattr(self, name).to(device))


class GroupRule(ScheduleRule):
    """The decision rule with the thresholds of each row's group.

    Nothing is decided before the layer that tells the group. A row of a group without certificate, or of
    none, stops asking there: its visual tokens never freeze and never leave.

    Parameters
    ----------
    num_rows, num_layers
        B and L.
    thresholds
        Of the groups.
    size
        Z of the finder.
    min_layer, fallback
        As for `ScheduleRule`.

    Attributes
    ----------
    found
        What was found of the rows.
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        thresholds: GroupThresholds,
        size: int,
        min_layer: int = 1,
        fallback: int | None = None,
    ) -> None:
        freeze = NEVER if thresholds.freeze_thresholds else None
        super().__init__(num_rows, num_layers, NEVER, min_layer, fallback, freeze)
        self.thresholds, self.found = thresholds, FoundGroups.none(num_rows, size)

    def wants(self, k: int) -> bool:
        """Does any row still need the heads, or its group, at k?"""
        if k <= self.thresholds.layer:
            return k == self.thresholds.layer and bool(self.asking_B.any())
        return super().wants(k)

    def step(self, k: int, logits: Tensor) -> None:
        """Take in the logits (on CPU) at k, (2, B); at the groups' layer what was found of the rows below."""
        if k == self.thresholds.layer:
            self._take(FoundGroups.unpacked(logits[2:]))
        super().step(k, logits[:2] if self.freezes else (logits[0] if logits.dim() == 2 else logits))

    def _take(self, found: FoundGroups) -> None:
        asked_B = self.asking_B.clone()
        self.found = FoundGroups(
            groups_B=torch.where(asked_B, found.groups_B, NOT_ASKED),
            distances_B=found.distances_B.masked_fill(~asked_B, torch.nan),
            projected_BZ=found.projected_BZ.masked_fill(~asked_B[:, None], torch.nan),
        )
        rows_B = self.found.groups_B.clamp(min=-1)  # -1: the last entry, never
        given = self.thresholds
        self.cut = _cuts(given.thresholds)[rows_B]
        if self.freezes:
            self.freeze_cut = _cuts(given.freeze_thresholds)[rows_B]
        open_B = (self.cut < torch.inf) | (self.freezes and torch.as_tensor(self.freeze_cut) < torch.inf)
        self.asking_B &= open_B


def _cuts(thresholds: tuple[float, ...]) -> Tensor:
    """(G + 1,) float32 levels that a logit must exceed; the last one, of no group, is infinite."""
    return torch.tensor([cut(one) for one in (*thresholds, NEVER)])


def thresholds_named(groups: GroupThresholds | None, text: str) -> tuple[float, float | None]:
    """The thresholds of leaving and of freezing (None: not stated) that a text asks for.

    Parameters
    ----------
    groups
        Of gates that were calibrated by group; else None.
    text
        A probability, or the name of one of the groups.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    try:
        return float(text), None
    except ValueError:
        pass
    if groups is None:
        raise ConfigError(f"threshold {text!r}: expected a probability in 0..1")
    return groups.of(text)
