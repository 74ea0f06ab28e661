"""torch.compile of the whole U-Net, with our node before and after it.

Compiling takes minutes on a CPU, so it runs only when asked: ``LDCP_TEST_COMPILE=inductor`` (needs
a C++ compiler) goes through ComfyUI's own node, ``LDCP_TEST_COMPILE=eager`` through the function
behind it, without generating code. What pruning itself must not do in a compiled region is always
tested, in tests/core/test_resblock.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from features import Kit

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("LDCP_TEST_COMPILE" not in os.environ, reason="set LDCP_TEST_COMPILE=eager"),
]
BACKEND = os.environ.get("LDCP_TEST_COMPILE", "")


@pytest.fixture
def kit(comfy, small_model, conditioning, tmp_path):
    return Kit(comfy, small_model, conditioning, tmp_path)


def compiled(kit, model):
    torch._dynamo.reset()
    if BACKEND == "inductor":
        return kit.model_node("TorchCompileModel", model, backend=BACKEND)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model=model, backend=BACKEND)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_is_pruned_as_an_uncompiled_one(comfy, kit, make_gates, masked, order):
    base, gates = kit.small_model(), make_gates(constants=20.0)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    if order == "before":
        model = compiled(kit, comfy.patch.attach(base, layer))
    else:
        model = comfy.patch.attach(compiled(kit, base), layer)
    latent = kit.sample(kit.graph(model))
    record = comfy.patch.attached(model).record
    assert record.evaluations == record.pruned_evaluations == 2
    dense = kit.sample(kit.graph(base))
    with masked(base, gates):
        expected = kit.sample(kit.graph(base))
    # generated code rounds differently, with pruning or without
    rounding = apart(kit.sample(kit.graph(compiled(kit, base))), dense)
    error, effect = apart(latent, expected), apart(dense, expected)
    print(
        f"\n{BACKEND}, {order}: {error:.1e} from masked, dense {effect:.1e}, "
        f"compiling alone {rounding:.1e}"
    )
    assert error <= max(2e-6, 2 * rounding) and rounding <= 1e-5 and effect >= 2e-4


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())
