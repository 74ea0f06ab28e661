"""FLAP beside the other cheap choices: as many channels, seen on training images alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldcp_core import Gates, Topology
from training import compare
from training.data import open_dataset
from training.denoising import Denoising
from training.gating import ChannelMeans, topology_of, watched
from training.models import DiffusionModel


def random_gates(topology: Topology) -> Gates:
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.channels, generator=generator) for s in topology.sites()}
    return Gates(scores, topology=topology)


def test_watching_gives_the_means_and_leaves_no_hook(model: DiffusionModel, images: Path) -> None:
    sites = topology_of(model.unet).sites()
    data = open_dataset(str(images), resolution=16)
    denoising = Denoising(model, 0)
    problem = denoising.problem(next(data.batches([0, 1, 2], 3, epochs=1)))
    with watched(model.unet, [s.name for s in sites]) as seen:
        denoising.dense(problem)
    with ChannelMeans(model.unet, sites) as means:
        denoising.dense(problem)
    for site, mean in means.constants().items():
        assert torch.allclose(seen.constants()[site], mean, atol=1e-6)
    assert set(seen.inputs) == {s.name for s in sites if s.kind == "inner"}
    assert not any(module._forward_hooks for module in model.unet.modules())
    with pytest.raises(RuntimeError), watched(model.unet, [s.name for s in sites]):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_flap_prefers_the_channels_that_stray(model: DiffusionModel, images: Path) -> None:
    gates = random_gates(topology_of(model.unet))
    site = next(iter(gates.scores))
    conv1 = model.unet.get_submodule(site)
    kept = conv1.weight.detach().clone()
    try:
        conv1.weight.data[::2] *= 1e-4  # these outputs are their bias, everywhere
        data = open_dataset(str(images), resolution=16)
        found = compare.flap_importance(
            Denoising(model, 0), data, list(range(16)), list(gates.scores)
        )
    finally:
        conv1.weight.data.copy_(kept)
    # not zero: the embedding still moves them from evaluation to evaluation
    assert found[site][::2].mean() < 0.1 * found[site][1::2].mean()
    assert found[site].mean().item() == pytest.approx(1.0)


def test_every_choice_keeps_as_many_channels(model: DiffusionModel, images: Path) -> None:
    gates = random_gates(topology_of(model.unet))
    flap = {site: torch.arange(s.numel()).float() for site, s in gates.scores.items()}
    kept = sum(int(keep.sum()) for keep in gates.keep_sets().values())
    for name, keep_sets in compare.candidates(model, gates, flap, seed=0).items():
        assert sum(int(keep.sum()) for keep in keep_sets.values()) == kept, name
    found = compare.compare(gates, model, str(images), seeds=[0], samples=4)
    assert {"learned", "FLAP, together", "FLAP, per site"} <= set(found)
    assert all(deviation > 0 for values in found.values() for deviation in values)
