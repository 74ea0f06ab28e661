"""A pruned U-Net as a file of its own: what gates leave of it, and nothing of the rest.

    from ldcp_core.export import load_exported, save_exported

    save_exported(pipe.unet, "gates.safetensors", "pruned.safetensors")
    pipe.unet = load_exported("pruned.safetensors")

Constants and corrections are folded into what is kept. Feed-forwards and attention are diffusers'
own modules, narrower. A ResBlock is a `PrunedResBlock`, whose constants can't be folded where they
meet its GroupNorm: they move statistics that depend on the image, and are normed by them. All of it
is PyTorch's standard operations, so that the U-Net can be exported further as any other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import Attention, CompactAttention
from .blocks import PADDINGS, Block, Padding
from .channels import Channels
from .diffusers import (
    EXPORTED,
    CompactBlock,
    DiffusersResBlock,
    UnsupportedModel,
    adapter,
    compact_blocks,
    fitted,
    topology_of,
)
from .feedforward import CompactFeedForward
from .gates import Gates
from .resblock import CompactResBlock, ResBlock
from .text import PATH, one_line

FORMAT, VERSION = "ldcp.export", "1"
#: where diffusers looks for the weights of a U-Net, in its folder and in that of a pipeline
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
#: how many levels a U-Net has at most, and how many blocks one after the other
LEVELS, DEPTH = 4, 24


class ExportFileError(ValueError):
    """A file that is not a usable exported U-Net."""


def save_exported(
    unet: Any,
    gates: Gates | str | PathLike[str],
    path: str | PathLike[str],
    *,
    sparsity: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what ``gates`` leave of a `UNet2DConditionModel` to a .safetensors file.

    The U-Net in memory stays as it is; LoRA must be fused into it. ``sparsity`` prunes that share
    of the gated channels by rank; without it the gates must not have stages. Constants and
    corrections are folded in float32, and all is rounded once to ``dtype`` (None: the U-Net's).

    Raises GateFileError for a file that holds no gates, UnsupportedModel where gates and U-Net
    don't fit or the U-Net can't be exported, ValueError for a sparsity outside [0, 1], and OSError
    when the disk refuses.
    """
    unet, found = fitted(unet, gates)
    if found.stages and sparsity is None:
        raise UnsupportedModel(
            f"the gates have {len(found.stages)} stages, and an exported U-Net prunes the same in "
            "every step; give a sparsity, or the gates that the stages were made of"
        )
    ((_, keep_sets),) = found.by_stage(sparsity)
    path, dtype = Path(path), dtype or unet.dtype
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    tensors: dict[str, Tensor | None] = unet.state_dict()
    with torch.no_grad():
        blocks = compact_blocks(unet, found.pruned(keep_sets), torch.float32)
    for block, compact in blocks.items():
        tensors |= {f"{block}.{name}": tensor for name, tensor in _tensors(compact).items()}
    kept = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    try:
        _built(config, found.padding, kept)
    except ValueError as error:
        raise UnsupportedModel(
            f"this U-Net can't be exported: {error}. Fuse and unload LoRA, and load it without "
            "quantization or layerwise casting"
        ) from error
    metadata = {"format": FORMAT, "version": VERSION, "padding": found.padding}
    temporary = path.with_name(f".{path.name[:50]}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file lets nobody else read it
        save_file(kept, temporary, {**metadata, "config": json.dumps(config)})
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensors(compact: CompactBlock) -> dict[str, Tensor | None]:
    """What is kept of a block by the names of the module that computes it; None for what is not."""
    found: dict[str, Tensor | None] = {}
    if isinstance(compact, CompactResBlock):
        layers: dict[str, Any] = {"conv1": compact.conv1, "conv2": compact.conv2}
        found = {name: getattr(compact, name) for name in ("shifts", "columns", "planes")}
        for name in ("inner", "residual"):
            channels: Channels | None = getattr(compact, name)
            found[f"{name}.keep"] = None if channels is None else channels.rows >= 0
    elif isinstance(compact, CompactFeedForward):
        layers = {"net.0.proj": compact.proj, "net.2": compact.out}
    else:
        layers = {"to_q": compact.q, "to_k": compact.k, "to_v": compact.v, "to_out.0": compact.out}
    found |= {f"{n}.{part}": value for n, of in layers.items() for part, value in vars(of).items()}
    if (
        isinstance(compact, (CompactFeedForward, CompactAttention))
        and not compact.out.weight.numel()
    ):
        return {**dict.fromkeys(found), "bias": compact.out.bias}
    return found


def load_exported(path: str | PathLike[str]) -> Any:
    """The `UNet2DConditionModel` of a file that `save_exported` wrote, on the CPU in eval mode.

    ``path`` is the file, the folder of a U-Net or that of a pipeline with it. Nothing in it is run
    or imported, and the full weights are never allocated.

    Raises ExportFileError for anything that is not such a file.
    """
    path = Path(path)
    for inside in (Path("unet", WEIGHTS), Path(WEIGHTS)):
        path = path / inside if (path / inside).is_file() else path
    if not path.is_file():
        raise _refused(path, f"there is no such file, and no {WEIGHTS} in such a folder")
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            _check_format(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata.get("config", ""))
        unet = _built(config, metadata.get("padding"), tensors)
    except (SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, ExportFileError):
            raise
        raise _refused(path, one_line(error)) from error
    unet.load_state_dict(tensors, assign=True)
    setattr(unet, EXPORTED, True)
    return unet


def _check_format(metadata: Mapping[str, str], path: Path) -> None:
    found = metadata.get("format"), metadata.get("version")
    if found != (FORMAT, VERSION):
        raise _refused(path, f"format and version {one_line(found)}, expected {FORMAT, VERSION}")


def _refused(path: Path, what: str) -> ExportFileError:
    return ExportFileError(
        f"{one_line(path, PATH)} is not a usable exported U-Net: {what}; export it again with "
        "training.export or save_exported, or update ldcp_core"
    )


def _built(config: Any, padding: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The U-Net that these tensors fill, on the meta device; raises ValueError where none does."""
    from diffusers import UNet2DConditionModel

    if padding not in PADDINGS:
        raise ValueError(f"padding rule {one_line(padding)}, expected one of {', '.join(PADDINGS)}")
    try:
        depths = [config["layers_per_block"], config["transformer_layers_per_block"]]
        depths.append(config.get("reverse_transformer_layers_per_block"))
        deepest = max(map(int, re.findall(r"\d+", json.dumps(depths))))
        if len(config["down_block_types"]) > LEVELS or deepest > DEPTH:
            raise ValueError("more blocks than any has")  # before they are built
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config).eval()
        blocks = topology_of(unet).blocks()
    except Exception as error:  # an odd config makes diffusers raise nearly anything
        raise ValueError(f"its config is not that of a U-Net ({one_line(error)})") from error
    for block in blocks:
        start = f"{block.name}."
        found = {n[len(start) :]: tensors[n] for n in tensors if n.startswith(start)}
        _shrink(unet, block, found, padding)
    expected = unet.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            what = "lacks" if name in expected else "is not to have"
            raise ValueError(f"it {what} the tensor {one_line(name)}")
        shape, types = expected[name].shape, FLOATS
        if expected[name].dtype == torch.bool:
            types = (torch.bool,)
        if tensors[name].shape != shape or tensors[name].dtype not in types:
            raise ValueError(
                f"tensor {name} is {tensors[name].dtype} {list(tensors[name].shape)}, expected "
                f"{list(shape)} of {' or '.join(map(str, types))}"
            )
    return unet


def _shrink(unet: Any, block: Block, found: Mapping[str, Tensor], padding: Padding) -> None:
    """Give a block on the meta device the sizes of what there is of it, by names within it."""
    module, kind = unet.get_submodule(block.name), block.site_kinds[0]
    if isinstance(block, ResBlock):
        inner, residual = keeps = [found.get(f"{name}.keep") for name in ("inner", "residual")]
        for keep in (keep for keep in keeps if keep is not None):
            if (keep.dtype, keep.shape) != (torch.bool, (block.outputs(),)):
                raise ValueError(f"a keep-set of {block.name} is not one of {block.outputs()}")
        if inner is not None or residual is not None:
            ops = DiffusersResBlock(block.name, module)
            unet.set_submodule(block.name, PrunedResBlock(ops, inner, residual, padding))
    elif set(found) == {"bias"}:
        unet.set_submodule(block.name, Constant(block.outputs()))
    else:
        channels, group = block.widths(kind)[1], block.group(kind)
        reader = found.get(f"{kind.reader}.weight")
        width = 0 if reader is None or reader.dim() != 2 else reader.shape[1]
        if not 0 < width <= channels or width % group:
            raise ValueError(f"{block.name} has {width} channels, expected some of {channels}")
        *owners, out = adapter(unet, block.name).layers()
        for layer in owners:
            _resize(layer, rows=kind.rows * width)
        _resize(out, columns=width)
        if isinstance(block, Attention):
            module.heads = module.sliceable_head_dim = width // group
            module.inner_dim = module.inner_kv_dim = width


def _resize(
    layer: Any, rows: int | None = None, columns: int | None = None, bias: bool = True
) -> None:
    """Give a convolution or linear layer so many outputs and inputs, None for those it has."""
    old, kind = layer.weight, "channels" if isinstance(layer, nn.Conv2d) else "features"
    rows = old.shape[0] if rows is None else rows
    columns = old.shape[1] if columns is None else columns
    layer.weight = nn.Parameter(old.new_empty(rows, columns, *old.shape[2:]))
    layer.bias = nn.Parameter(old.new_empty(rows)) if bias and layer.bias is not None else None
    setattr(layer, f"out_{kind}", rows)
    setattr(layer, f"in_{kind}", columns)


class Constant(nn.Module):
    """A feed-forward or attention of which nothing is kept: the bias that its constants left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels, device="meta"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias [C] in each place of a map [..., C]."""
        return self.bias.expand_as(x)


class KeptChannels(nn.Module):
    """`Channels` as buffers, of which a file holds the keep-set alone."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        for name, found in vars(Channels.of(keep, keep.device)).items():
            self.register_buffer(name, found, persistent=False)


class PrunedResBlock(nn.Module, CompactResBlock):
    """A ResnetBlock2D of which a part is kept: `CompactResBlock` with parameters of its own.

    Its layers have diffusers' names. Beside them are

    - ``inner.keep`` and ``residual.keep``, bool [C]: the channels kept; absent where all are,
    - ``shifts`` [C], added to the time embedding: the constants of pruned inner channels, conv1's
      bias of kept ones,
    - ``columns`` [9·O, P], or [O, P] under rule ``extend``: what conv2 makes of normed constants,
    - ``planes`` [C]: the constants of pruned residual channels, and where inner channels are pruned
      too, conv2's bias of kept ones.
    """

    def __init__(
        self, ops: DiffusersResBlock, inner: Tensor | None, residual: Tensor | None, rule: Padding
    ) -> None:
        nn.Module.__init__(self)
        self.ops, self.padding, self.folds, self._inside = ops, rule, True, {}
        for name, part in ops.block.named_children():
            self.add_module(name, part)
        for name, keep in (("inner", inner), ("residual", residual)):
            self.register_module(name, None if keep is None else KeptChannels(keep))
        channels = ops.block.conv1.out_channels
        kept, rows = (channels if k is None else int(k.sum()) for k in (inner, residual))
        _resize(self.conv1, rows=kept, bias=inner is None)
        _resize(self.conv2, rows=rows, columns=kept, bias=inner is None or residual is None)
        taps = 9 if rule == "zero" else 1
        for name, keep, shape in (
            ("shifts", inner, (channels,)),
            ("columns", inner, (taps * rows, channels - kept)),
            ("planes", residual, (channels,)),
        ):
            new = None if keep is None else nn.Parameter(torch.empty(shape, device="meta"))
            self.register_parameter(name, new)

    def forward(self, x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, I, H, W] and the time embedding to [B, O, H, W].

        Raises UnsupportedModel where an adapter has been put on a convolution: weights are read.
        """
        for layer in map(self.get_submodule, ("conv1", "conv2")):
            if type(layer) is not nn.Conv2d:
                raise UnsupportedModel(
                    f"{type(layer).__name__} is in the place of a convolution of an exported "
                    "ResBlock; fuse LoRA into the U-Net before it is exported, or put it on other "
                    "layers"
                )
        return CompactResBlock.__call__(self, self.ops, x, self.ops.embed(temb))
