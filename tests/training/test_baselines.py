"""Cheap choices beside learned ones: as many channels, measured on training images alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldcp_core import Gates, Topology
from ldcp_core.diffusers import topology_of
from training.data.encoding import FreshImages
from training.data.images import open_dataset
from training.evaluation.baselines import baselines, measured
from training.learning.corrections import corrections
from training.model.gating import ChannelMeans, watched
from training.model.load import DiffusionModel
from training.sample import Candidate
from training.step.denoising import Denoising


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation.baselines.SAMPLES", 16)


def random_gates(topology: Topology) -> Gates:
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.channels, generator=generator) for s in topology.sites()}
    return Gates(scores, topology=topology)


def test_watching_gives_the_means_and_leaves_no_hook(model: DiffusionModel, images: Path) -> None:
    sites = topology_of(model.unet).sites()
    data = FreshImages(open_dataset(str(images), resolution=16), model)
    denoising = Denoising(model, 0)
    problem = denoising.problem(next(data.batches([0, 1, 2], 3, epochs=1)))
    with watched(model.unet, sites) as seen:
        denoising.dense(problem)
    with ChannelMeans(model.unet, sites) as means:
        denoising.dense(problem)
    for site, mean in means.constants().items():
        assert torch.allclose(seen.constants()[site], mean, atol=1e-6)
    assert set(seen.inputs) == {s.name for s in sites if s.kind.name == "inner"}
    assert not any(module._forward_hooks for module in model.unet.modules())
    with pytest.raises(RuntimeError), watched(model.unet, sites):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_flap_prefers_the_channels_that_stray(model: DiffusionModel, images: Path) -> None:
    gates = random_gates(topology_of(model.unet))
    site = next(iter(gates.scores))
    conv1 = model.unet.get_submodule(site)
    kept = conv1.weight.detach().clone()
    try:
        conv1.weight.data[::2] *= 1e-4  # these outputs are their bias, everywhere
        data = FreshImages(open_dataset(str(images), resolution=16), model)
        denoising = Denoising(model, 0)
        problems = [denoising.problem(batch) for batch in data.batches(list(range(16)), 2)]
        found = measured(gates, denoising, problems, seed=0)["FLAP"]
    finally:
        conv1.weight.data.copy_(kept)
    # not zero: the embedding still moves them from evaluation to evaluation
    assert found[site][::2].mean() < 0.1 * found[site][1::2].mean()
    assert found[site].mean().item() == pytest.approx(1.0)


def test_every_choice_keeps_as_many_channels_and_per_site_the_same_counts(
    model: DiffusionModel, images: Path
) -> None:
    gates = random_gates(topology_of(model.unet))
    counts = {site: int(keep.sum()) for site, keep in gates.keep_sets().items()}
    data = FreshImages(open_dataset(str(images), resolution=16), model)
    beside = Candidate(gates)
    found = baselines("a", beside, Denoising(model, 0), data, list(range(16)), seed=1)
    assert len(found) == 8 and "a-own-effect-per-site" in found
    for name, candidate in found.items():
        assert candidate.gates is not None and candidate.beside == "a"
        of = {site: int(keep.sum()) for site, keep in candidate.gates.keep_sets().items()}
        assert sum(of.values()) == sum(counts.values()), name
        assert (of == counts) == name.endswith("per-site"), name


def test_beside_corrected_gates_every_choice_has_corrections_of_its_own(
    model: DiffusionModel, images: Path
) -> None:
    gates, denoising = random_gates(topology_of(model.unet)), Denoising(model, 0)
    data = FreshImages(open_dataset(str(images), resolution=16), model)
    problems = [denoising.problem(batch) for batch in data.batches(list(range(16)), 2)]
    gates = replace(gates, corrections=corrections(denoising, problems, gates, 2))
    assert gates.corrections
    found = baselines("a", Candidate(gates), denoising, data, list(range(16)), seed=1)
    for name, candidate in found.items():
        assert candidate.gates is not None
        for site, own in candidate.gates.corrections.items():
            assert own is not gates.corrections.get(site), name
            kept = int(candidate.gates.keep_sets()[site].sum())
            assert own.left.shape[1] == 2 and own.right.shape == (2, 9 * kept), name
    assert any(candidate.gates.corrections for candidate in found.values() if candidate.gates)
