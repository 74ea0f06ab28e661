"""The U-Net in another precision, for the time of a context: cast, stored in fp8, or in int8.

``fp32``, ``bf16`` and ``fp16`` compute in what they store; of a U-Net that was loaded in fewer bits
``fp32`` casts the weights up at every use, so that none is held twice. ``fp8`` keeps the weights
and biases of linear layers and convolutions as float8_e4m3fn and casts them up at every use, as
diffusers' layerwise casting does. ``int8`` keeps their weights as torchao's symmetric integers with
a scale per output channel. Both compute in bf16 on a GPU and in fp32 on a CPU, so they save memory,
and no time. Normalisation layers are computed in full.

Pruning comes first: compact blocks are cut, and their constants folded, from the weights as
loaded, and what is left is cast or quantized. Scales then fit the weights that remain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldcp_core import ConvWeights, LinearWeights
from ldcp_core.diffusers import CompactBlock, gated_layers
from training.errors import UserError
from training.model.gating import overridden, running
from training.model.load import DTYPES

STORED = ("fp8", "int8")
PRECISIONS = (*DTYPES, *STORED)
#: layers whose weights are stored in few bits
STORING = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Storage:
    """How weights and biases are kept, and how to have them back for computing in ``dtype``."""

    dtype: torch.dtype
    weight: Callable[[Tensor], Tensor]
    bias: Callable[[Tensor], Tensor]

    def back(self, stored: Tensor) -> Tensor:
        """A weight or bias to compute with."""
        whole = stored if type(stored) in (Tensor, nn.Parameter) else stored.dequantize()
        return whole.to(self.dtype)


def storage_of(precision: str, device: torch.device) -> Storage:
    """What a precision of `PRECISIONS` means; raises UserError where int8 lacks torchao."""
    if precision == "fp32":
        return Storage(torch.float32, lambda t: t, lambda t: t)
    if precision in DTYPES:
        dtype = DTYPES[precision]
        return Storage(dtype, lambda t: t.to(dtype), lambda t: t.to(dtype))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision == "fp8":
        return Storage(dtype, _to_fp8, _to_fp8)
    return Storage(dtype, _int8(), lambda t: t.to(dtype))


def _to_fp8(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn)


def _int8() -> Callable[[Tensor], Tensor]:
    try:
        from torchao.quantization import Int8Tensor, PerAxis
    except ImportError as error:
        raise UserError(
            f"--precision int8 needs torchao ({error}).",
            "torchao 0.18 or newer",
            'pip install ".[int8]"',
        ) from error

    def quantized(weight: Tensor) -> Tensor:
        # nothing is left of a layer that lost all its rows, and nothing to take a scale from
        return Int8Tensor.from_hp(weight, PerAxis(0)) if weight.numel() else weight

    return quantized


@contextmanager
def in_precision(
    unet: UNet2DConditionModel, precision: str, blocks: Mapping[str, CompactBlock]
) -> Iterator[int]:
    """Run the U-Net through compact ``blocks``, all its weights in this precision.

    Inputs and outputs stay what they are. Yields the bytes of the tensors it then consists of, the
    full weights of compact blocks not among them. Afterwards the U-Net holds the same objects as
    before. Raises UserError where a package is missing.
    """
    storage = storage_of(precision, unet.device)
    gated = {id(layer) for layer in gated_layers(unet, blocks)}
    kept = {name: dict(module._parameters) for name, module in unet.named_modules()}
    packed: dict[str, Any] = {name: PackedBlock(block, storage) for name, block in blocks.items()}
    layers = {}
    try:
        for name, module in unet.named_modules():
            storing = isinstance(module, STORING) and id(module) not in gated
            for key, value in kept[name].items():
                if value is not None:
                    new = (
                        value.new_empty(0)
                        if id(module) in gated
                        else _stored(storage, key, value)
                        if storing
                        else value.to(storage.dtype)
                    )
                    module._parameters[key] = nn.Parameter(new, requires_grad=False)
            if storing and (precision in STORED or module.weight.dtype != storage.dtype):
                layers[name] = _stored_forward(module, storage)
        with ExitStack() as stack:
            stack.enter_context(overridden(unet, layers))
            stack.enter_context(running(unet, packed))
            stack.enter_context(overridden(unet, {"": _cast_forward(unet, storage.dtype)}))
            tensors = [*unet.parameters(), *unet.buffers()]
            tensors += [t for block in packed.values() for t in block.tensors()]
            yield sum(real_bytes(t) for t in {id(t): t for t in tensors}.values())
    finally:
        for name, module in unet.named_modules():
            module._parameters.update(kept[name])


def real_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a tensor subclass (int8 values, scales) consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(real_bytes(getattr(tensor, name)) for name in names)


class PackedBlock:
    """A compact block whose weights are stored, and had back for every call."""

    def __init__(self, block: CompactBlock, storage: Storage) -> None:
        self._storage = storage
        self._block = _with_weights(block, storage.weight, storage.bias)

    def __call__(self, *args: Any) -> Tensor:
        back = self._storage.back
        return _with_weights(self._block, back, back)(*args)

    def tensors(self) -> list[Tensor]:
        """Every tensor that has to stay on the compute device."""
        return self._block.tensors()


def _with_weights(
    block: CompactBlock, weight: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]
) -> Any:
    """A copy of the block whose weights and biases went through the functions."""
    found: Any = copy(block)
    for name, of in vars(block).items():
        if isinstance(of, (ConvWeights, LinearWeights)):
            new = None if of.bias is None else bias(of.bias)
            setattr(found, name, replace(of, weight=weight(of.weight), bias=new))
    if getattr(block, "columns", None) is not None:
        found.columns = weight(found.columns)
    return found


def _stored(storage: Storage, key: str, value: Tensor) -> Tensor:
    return storage.weight(value.detach()) if key == "weight" else storage.bias(value.detach())


def _stored_forward(layer: Any, storage: Storage) -> Callable[[Tensor], Tensor]:
    """The forward of a linear layer or convolution whose parameters are stored."""
    compute = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward

    def forward(x: Tensor) -> Tensor:
        bias = None if layer.bias is None else storage.back(layer.bias)
        result: Tensor = compute(x, storage.back(layer.weight), bias)
        return result

    return forward


def _cast_forward(unet: UNet2DConditionModel, dtype: torch.dtype) -> Callable[..., Any]:
    """The U-Net's forward in ``dtype`` for inputs and outputs in any."""
    forward = unet.forward

    def cast(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        found = forward(sample.to(dtype), timestep, encoder_hidden_states.to(dtype), **options)
        if not options.get("return_dict", True):
            return (found[0].to(sample.dtype),)
        return replace(found, sample=found.sample.to(sample.dtype))

    return cast
