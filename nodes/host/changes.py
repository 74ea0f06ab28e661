"""Whether what pruning leaves out is still the code that it stands in for.

A compact block computes itself what the host's and PyTorch's modules would have computed. Other
extensions change what calling those does: on one module (a ``forward`` of its own, a hook), on the
class, in `torch.nn.functional`, or by a hook on all modules, and some only while the U-Net runs. So
a block is judged by the functions that a call would run, and the judgement is looked at again
before every use, which compares some objects and takes microseconds.

A function is a class's own when it was written in the class's module. What ``m.forward = saved``
leaves behind calls the same function, and is no change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

#: the methods that calling a module may go through, but for a convolution's last
METHODS = ("__call__", "_call_impl", "forward", "_forward", "forward_comfy_cast_weights")
#: those of them that a module's own attribute can stand in for; a block's own `forward` may be ours
ATTRIBUTES = ("_call_impl", "forward", "forward_comfy_cast_weights")
CONVOLVE = "_conv_forward"
#: whose classes are taken for what they are called
LIBRARIES = ("torch", "comfy")

Slot = tuple[Mapping[str, Any], str, Any]  # where a function is looked up, its name, what is there


def changed_call(module: nn.Module, *, any_class: bool = False) -> str:
    """What others have done to calls of ``module``, in words that follow "has"; empty: nothing.

    A class of neither ComfyUI nor PyTorch is a change too, but for ``any_class``.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return f"put a hook on a {type(module).__name__}"
    attributes = (changed_attribute(module, name) for name in ATTRIBUTES)
    return next(filter(None, attributes), "") or changed_class(type(module), any_class)


def changed_attribute(module: nn.Module, name: str) -> str:
    """The same of a method that the module itself has as an attribute."""
    found = vars(module).get(name)
    same = getattr(found, "__func__", None) is getattr(type(module), name, None)
    if found is None or (same and getattr(found, "__self__", None) is module):
        return ""
    return f"replaced the {name} of a {type(module).__name__}"


def changed_class(kind: type, any_class: bool = False, names: Iterable[str] = METHODS) -> str:
    """The same of the methods of a module's class."""
    for owner, name in _methods(kind, names):
        if not any_class and owner.__module__.split(".")[0] not in LIBRARIES:
            return f"put a {owner.__qualname__} in the model"
        if not _is_own(vars(owner)[name], owner.__module__):
            return f"replaced {owner.__qualname__}.{name}"
    return ""


def changed_function(name: str) -> str:
    """The same of a function of `torch.nn.functional`."""
    found = vars(F)[name]
    own = isinstance(found, BuiltinFunctionType) or _is_own(found, F.__name__)
    return "" if own else f"replaced torch.nn.functional.{name}"


def changed_convolution(conv: nn.Module) -> str:
    """The same of what a convolution does with its weights, whatever these are."""
    changed = changed_attribute(conv, CONVOLVE) or changed_class(type(conv), True, [CONVOLVE])
    return changed or changed_function("conv2d")


def hooks_on_all() -> str:
    """The same of hooks on all modules."""
    hooked = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return "put a hook on all modules" if hooked else ""


class Watch:
    """What calling some modules runs now, to be compared with what it would run later.

    Of ``kinds`` only the classes count, of ``functions`` those of `torch.nn.functional`; ``others``
    are more attributes to compare.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        kinds: Iterable[type] = (),
        functions: Iterable[str] = (),
        others: Iterable[tuple[nn.Module, str]] = (),
    ) -> None:
        self._attributes = [vars(module) for module in modules]
        methods = [m for kind in (*map(type, modules), *kinds) for m in _methods(kind)]
        places: list[tuple[Mapping[str, Any], str]] = []
        places += [(own, name) for own in self._attributes for name in ATTRIBUTES]
        places += [(own["_modules"], part) for own in self._attributes for part in own["_modules"]]
        places += [(vars(module), name) for module, name in others]
        places += [(vars(owner), name) for owner, name in dict.fromkeys(methods)]
        places += [(vars(F), name) for name in functions]
        self._slots: list[Slot] = [(space, name, space.get(name)) for space, name in places]

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        for space, name, found in self._slots:
            if space.get(name) != found:
                return False
        for own in self._attributes:
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
        return not hooks_on_all()


def _methods(kind: type, names: Iterable[str] = (*METHODS, CONVOLVE)) -> Iterator[tuple[type, str]]:
    """Every class that defines one of the methods of ``kind``, and the method."""
    for owner in kind.__mro__:
        for name in names:
            if name in vars(owner) and owner is not object:
                yield owner, name


def _is_own(function: Any, module: str) -> bool:
    """Whether a function was written in the module of that name."""
    known = sys.modules.get(module)
    return (
        isinstance(function, FunctionType)
        and known is not None
        and function.__globals__ is vars(known)
    )
