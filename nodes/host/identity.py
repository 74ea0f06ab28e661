"""Whether a model has the base weights that the gates were trained on.

Gates often work on fine-tunes and merges, so a difference is worth a warning, never a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ldcp_core import Gates, fingerprint
from .model import layer_path, model_topology, unet

#: what the user should know where they differ
DIFFERS = (
    "these gates were trained on other base weights than this model's; that works for fine-tunes "
    "and merges, but compare some images with pruning off"
)
#: dtypes that round to the same float16 samples as the weights the gates were trained on
COMPARABLE = (torch.float32, torch.float16)


def differs_from_training(model: Any, gates: Gates) -> bool:
    """True when the gated layers are known to differ from those of the training.

    False also where it cannot be told: no fingerprint in the file, or weights in another dtype.
    """
    expected = gates.info.get("fingerprint")
    own = None if expected is None else own_fingerprint(model, gates)
    return own is not None and own != expected


def own_fingerprint(model: Any, gates: Gates) -> str | None:
    """The fingerprint of the layers that ``gates`` names, LoRA left aside.

    None where it could not be compared: weights that round otherwise, or are not loaded.
    """
    weights = base_weights(model, gates)
    return fingerprint(weights) if all(map(_comparable, weights.values())) else None


def _comparable(weight: Tensor) -> bool:
    plain = type(weight.data) is Tensor  # a quantised one says the dtype that it was made of
    return plain and weight.dtype in COMPARABLE and not weight.is_meta


def base_weights(model: Any, gates: Gates) -> dict[str, Tensor]:
    """Site -> weight of a ModelPatcher without the LoRA that may be merged into it."""
    layers = model_topology(model.model).layers_per_block
    found = {}
    for site in gates.scores:
        path = layer_path(site, layers)
        original = model.backup.get(f"diffusion_model.{path}.weight")
        if original is None:
            found[site] = unet(model.model).get_submodule(path).weight
        else:
            found[site] = original.weight
    return found
