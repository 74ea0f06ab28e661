"""The gated layers of the small model, and by hand what pruning them leaves out."""

from __future__ import annotations

GATED = [
    f"middle_block.{block}.{path}" for block in (0, 2) for path in ("in_layers.2", "out_layers.3")
]
WIDTH = 128


def convs(model):
    return [model.model.diffusion_model.get_submodule(path) for path in GATED]


def weights_left_out(layer):
    """Bytes of float32 weights and biases that a pruned evaluation needs no more, by hand."""
    kept = {site: int(keep.sum()) for site, keep in layer.keep_sets.items()}
    taps = 9 if layer.gates.padding == "zero" else 1
    saved = 0
    for block in ("mid_block.resnets.0", "mid_block.resnets.1"):
        inner, residual = (kept.get(f"{block}.{conv}", WIDTH) for conv in ("conv1", "conv2"))
        full = 2 * (9 * WIDTH * WIDTH + WIDTH)
        rows = 9 * WIDTH * inner + inner  # conv1's kept rows, all its columns
        columns = 9 * inner * residual + residual  # conv2's kept rows and columns
        folded = taps * (WIDTH - inner) * residual  # its pruned columns, for the constants
        saved += full - rows - columns - folded
    return 4 * saved


def unload(comfy, device):
    """Make ComfyUI unload everything from the device, as when another model needs the room."""
    comfy.root.model_management.free_memory(2**60, device)
