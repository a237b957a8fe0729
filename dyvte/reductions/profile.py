"""What a backbone's layers do with visual tokens, measured once: the calibration of YOPO's reductions.

A folder with `visual_profile.json` (backbone, data, number of samples) and `visual_profile.safetensors`.

Shapes: S samples, L decoder layers, H query heads, M neurons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dyvte.backbones import Backbone, fingerprint, weights_digest
from dyvte.errors import CheckpointError, GateMismatchError
from dyvte.files import write_atomically

CONFIG_FILE, TENSOR_FILE = "visual_profile.json", "visual_profile.safetensors"


@dataclass(frozen=True, kw_only=True)
class VisualProfile:
    """Measured on the un-pruned model.

    Attributes
    ----------
    rho_SLH
        (S, L, H) float32: attention to visual tokens over attention to text, summed over a sample's queries.
    importance_LM
        (L, M) float32: mean size of what each neuron adds to a visual token.
    about
        Backbone (id, fingerprint, weights), data, dyvte version.
    """

    rho_SLH: Tensor
    importance_LM: Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the two files, each whole or not at all.

        Parameters
        ----------
        folder
            Made where it does not exist.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"rho": self.rho_SLH.contiguous(), "importance": self.importance_LM.contiguous()}
        write_atomically(folder / TENSOR_FILE, save(tensors))
        write_atomically(folder / CONFIG_FILE, (json.dumps(self.about, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisualProfile:
        """Read a folder.

        Parameters
        ----------
        folder
            Written by `save_pretrained`.

        Raises
        ------
        CheckpointError
            If it holds no profile, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSOR_FILE)
            return cls(rho_SLH=tensors["rho"], importance_LM=tensors["importance"], about=about)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no visual profile ({error}): make one with `dyvte profile`"
            ) from error

    def check(self, backbone: Backbone) -> None:
        """See that this was measured on the backbone in hand.

        Parameters
        ----------
        backbone
            Its architecture and weights are compared with the recorded ones.

        Raises
        ------
        GateMismatchError
            It was measured on another.
        """
        for name, of in (("fingerprint", fingerprint), ("weights", weights_digest)):
            want, have = self.about.get("backbone", {}).get(name), of(backbone.model)
            if want and have and want != have:
                raise GateMismatchError(
                    f"this visual profile was measured on another backbone ({name} {want}), the model in "
                    f"hand has {have}: measure it anew with `dyvte profile`"
                )
