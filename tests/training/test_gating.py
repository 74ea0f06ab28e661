"""Gates on a diffusers U-Net: the same channels, the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from ldcp_core import PADDINGS, PrunedSite, SoftGate
from ldcp_core.diffusers import topology_of
from training.model.gating import ChannelMeans, compacted, hard_gates, masked
from training.model.load import DiffusionModel

TOLERANCE = 1e-5


def keep_sets(
    model: DiffusionModel, share: float, seed: int = 0, scope: str = "mid"
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sites = topology_of(model.unet).sites(scope)
    return {
        s.name: (
            torch.rand(s.channels, generator=generator)[:: s.group] >= share
        ).repeat_interleave(s.group)
        for s in sites
    }


def evaluate(model: DiffusionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 32, 40, generator=generator)
    context = torch.randn(2, 7, 16, generator=generator)
    return model.unet(latents, torch.tensor([10, 900]), encoder_hidden_states=context).sample


def constants(model: DiffusionModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sites = topology_of(model.unet).all_sites()
    return {s.name: torch.randn(s.channels, generator=generator) for s in sites}


def of(keep, mu=None, padding="zero") -> dict[str, PrunedSite]:
    return {site: PrunedSite(k, (mu or {}).get(site), padding) for site, k in keep.items()}


def test_the_site_map_names_every_resblock_of_diffusers_with_its_widths(
    model: DiffusionModel,
) -> None:
    blocks = topology_of(model.unet).res_blocks()
    found = {
        name: (module.in_channels, module.out_channels)
        for name, module in model.unet.named_modules()
        if type(module).__name__ == "ResnetBlock2D"
    }
    assert {b.name: (b.in_channels, b.out_channels) for b in blocks} == found


@pytest.mark.parametrize("scope", ["mid", "up", "down", "ff", "heads", "all+ff+heads"])
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_compact_equals_masked_in_the_whole_unet_and_differs_from_dense(
    model: DiffusionModel, padding: str, scope: str
) -> None:
    keep, mu = keep_sets(model, 0.5, scope=scope), constants(model)
    dense = evaluate(model)
    with masked(model.unet, hard_gates(of(keep, mu, padding)), padding):
        reference = evaluate(model)
    with compacted(model.unet, of(keep, mu, padding)):
        compact = evaluate(model)
    assert (compact - reference).abs().max() < TOLERANCE * reference.abs().max().clamp(min=1)
    assert (reference - dense).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_all_gates_open_is_bit_identical_to_dense(model: DiffusionModel) -> None:
    keep = keep_sets(model, 0.0, scope="all+ff+heads")
    dense = evaluate(model)
    with masked(model.unet, hard_gates(of(keep)), "zero"):
        assert torch.equal(evaluate(model), dense)
    with compacted(model.unet, of(keep)):
        assert torch.equal(evaluate(model), dense)


@torch.no_grad()
def test_nothing_is_left_on_the_modules_also_after_an_error(model: DiffusionModel) -> None:
    before = evaluate(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        with masked(model.unet, hard_gates(of(keep_sets(model, 0.5))), "zero"):
            raise RuntimeError("in the middle")
    assert not any("forward" in vars(module) for module in model.unet.modules())
    assert torch.equal(evaluate(model), before)


@pytest.mark.parametrize("kind", ["inner", "residual", "hidden"])
@torch.no_grad()
def test_constants_are_the_mean_outputs_of_the_gated_layers(
    model: DiffusionModel, kind: str
) -> None:
    sites = topology_of(model.unet).sites("all+ff+heads")
    site = next(site for site in sites if site.kind.name == kind)
    seen: list[torch.Tensor] = []
    layer = model.unet.get_submodule(site.name)
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with ChannelMeans(model.unet, sites) as means:
        evaluate(model)
    hook.remove()
    expected = seen[0].mean((0, 1) if kind == "hidden" else (0, 2, 3))
    assert torch.allclose(means.constants()[site.name], expected, atol=1e-6)
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_the_gradient_reaches_every_mask_and_no_weight(model: DiffusionModel) -> None:
    with torch.no_grad():
        dense = evaluate(model)
    masks = {
        k: v.float().requires_grad_()
        for k, v in keep_sets(model, 0.5, scope="all+ff+heads").items()
    }
    gates = {k: SoftGate(m, torch.zeros(m.numel())) for k, m in masks.items()}
    with masked(model.unet, gates, "zero"):
        (evaluate(model) - dense).square().mean().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in masks.values())
    assert all(p.grad is None for p in model.unet.parameters())
