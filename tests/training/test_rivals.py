"""Other ways to leave as few weights: the closed form, what removing means, and the table."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldcp_core import Gates, Site
from ldcp_core.diffusers import topology_of
from training.data.encoding import FreshImages
from training.data.images import open_dataset
from training.errors import UserError
from training.evaluation import rivals as made
from training.evaluation import surgeon
from training.evaluation.rivals import (
    fine_tune_,
    hessians,
    kept_counts,
    obs_,
    remove_,
    rivals,
    structural_,
    weights_per_channel,
)
from training.evaluation.surgeon import damped_inverse, prices, removed
from training.model.load import DiffusionModel
from training.sample import Candidate
from training.step.denoising import Denoising, Problem

SCOPE = "all+ff+heads"


def layer(outputs: int, inputs: int, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Weight [O, n] and correlated inputs [N, n], in float64."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(rows, inputs, generator=g, dtype=torch.float64) @ mixed
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x


def refitted(weight: Tensor, x: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    """By least squares: the weight on ``columns`` alone that comes nearest, and its error."""
    found = torch.linalg.lstsq(x[:, columns], x @ weight.T).solution.T
    return found, float((x[:, columns] @ found.T - x @ weight.T).square().sum())


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon, "DAMPING", 0.0)


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("size", [1, 3])
def test_a_structure_costs_what_the_error_rises_by_when_the_rest_is_refitted(size: int) -> None:
    weight, x = layer(5, 12)
    none = torch.zeros(12 // size, dtype=torch.bool)
    price, _ = prices(weight, damped_inverse(x.T @ x), none)
    for number, cost in enumerate(price.tolist()):
        others = torch.ones(12, dtype=torch.bool)
        others[number * size : (number + 1) * size] = False
        assert cost == pytest.approx(refitted(weight, x, others)[1], rel=1e-6)


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("size", [1, 3])
def test_what_the_rest_becomes_is_the_least_squares_solution(size: int) -> None:
    weight, x = layer(5, 24)
    keep, found = removed(weight, x.T @ x, 3, 24 // size)
    columns = keep.repeat_interleave(size)
    best, error = refitted(weight, x, columns)
    assert keep.sum() == 3 and torch.allclose(found[:, columns], best, rtol=1e-6)
    assert not found[:, ~columns].any()
    unchanged = (x[:, columns] @ weight[:, columns].T - x @ weight.T).square().sum()
    assert error < 0.9 * unchanged  # so that the update matters here


@pytest.mark.usefixtures("undamped")
def test_the_cheapest_goes_first_and_every_band_keeps_as_many() -> None:
    weight, x = layer(5, 12)
    price, _ = prices(weight, damped_inverse(x.T @ x), torch.zeros(12, dtype=torch.bool))
    keep, _ = removed(weight, x.T @ x, 11, 12)
    assert keep.logical_not().nonzero().item() == int(price.argmin())
    weight[:, :6] *= 100  # alone, the first half would all be kept
    keep, _ = removed(weight, x.T @ x, 6, 12)
    assert keep.view(2, -1).sum(1).tolist() == [6, 0]
    keep, _ = removed(weight, x.T @ x, 6, 12, bands=2)
    assert keep.view(2, -1).sum(1).tolist() == [3, 3]


# --- in a U-Net -----------------------------------------------------------------------------------


@pytest.fixture
def denoising(model: DiffusionModel) -> Denoising:
    """A U-Net of its own, to be pruned."""
    return Denoising(replace(model, unet=copy.deepcopy(model.unet)), 0)


@pytest.fixture
def sites(model: DiffusionModel) -> list[Site]:
    return [site for site in topology_of(model.unet).sites(SCOPE) if site.reader]


@pytest.fixture
def fresh(model: DiffusionModel, images: Path) -> FreshImages:
    return FreshImages(open_dataset(str(images), resolution=16), model)


def problems(denoising: Denoising, images: FreshImages, count: int) -> list[Problem]:
    stream = images.batches(list(range(16)), 2, seed=0, epochs=None)
    return [denoising.problem(next(stream)) for _ in range(count)]


def everything(sites: list[Site]) -> dict[str, int]:
    return {site.name: site.channels for site in sites}


def test_keeping_everything_changes_nothing(
    denoising: Denoising, sites: list[Site], fresh: FreshImages
) -> None:
    given = problems(denoising, fresh, 2)
    before = denoising.dense(given[0])
    state = copy.deepcopy(denoising.model.unet.state_dict())
    obs_(denoising, given, sites, everything(sites))
    values = {site.name: torch.rand(site.channels) for site in sites}
    structural_(denoising.model.unet, values, sites, everything(sites))
    after = denoising.model.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert torch.equal(denoising.dense(given[0]), before)


def test_every_group_of_a_norm_keeps_as_many_channels(
    denoising: Denoising, sites: list[Site], fresh: FreshImages
) -> None:
    site = next(s for s in sites if s.name == "mid_block.resnets.0.conv1")
    kept = {site.name: 24}
    block = denoising.model.unet.mid_block.resnets[0]
    with torch.no_grad():
        block.conv1.bias.copy_(torch.arange(32.0))  # tells afterwards which are left
        block.conv2.weight[:, :16] *= 100  # and makes the last ones matter least
    groups = []
    for way in ("obs", "structural"):
        unet = copy.deepcopy(denoising.model.unet)
        if way == "obs":
            smaller = Denoising(replace(denoising.model, unet=unet), 0)
            obs_(smaller, problems(smaller, fresh, 2), [site], kept)
        else:
            structural_(unet, {site.name: -torch.arange(32.0)}, [site], kept)
        left = unet.mid_block.resnets[0].conv1.bias.long()
        groups.append((left // 4).bincount(minlength=8).tolist())
    assert groups == [[3] * 8] * 2


@torch.no_grad()
def test_a_removed_channel_leaves_nothing_behind(denoising: Denoising, sites: list[Site]) -> None:
    """Against a block written out again, in which the norm knows the survivors alone."""
    unet = denoising.model.unet
    site = next(s for s in sites if s.name == "mid_block.resnets.0.conv1")
    block = unet.mid_block.resnets[0]
    g = torch.Generator().manual_seed(0)
    x, temb = torch.randn(2, 32, 6, 6, generator=g), torch.randn(2, 64, generator=g)
    keep = torch.arange(32) % 4 != 1  # three of the four channels of each of eight groups
    h = F.conv2d(F.silu(block.norm1(x)), block.conv1.weight, block.conv1.bias, padding=1)
    h = (h + block.time_emb_proj(F.silu(temb))[:, :, None, None])[:, keep]
    grouped = h.view(2, 8, -1)
    spread = grouped.var(2, correction=0, keepdim=True) + block.norm2.eps
    h = ((grouped - grouped.mean(2, keepdim=True)) / spread.sqrt()).view(2, 24, 6, 6)
    weight, bias = (p[keep, None, None] for p in (block.norm2.weight, block.norm2.bias))
    h = F.silu(h * weight + bias)
    expected = x + F.conv2d(h, block.conv2.weight[:, keep], block.conv2.bias, padding=1)
    dense = block(x, temb)
    remove_(unet, site, keep)
    assert torch.allclose(block(x, temb), expected, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hidden", "heads"])
def test_a_channel_removed_between_linear_layers_is_as_good_as_zero(
    denoising: Denoising, sites: list[Site], fresh: FreshImages, kind: str
) -> None:
    unet = denoising.model.unet
    site = next(s for s in sites if s.kind.name == kind)
    keep = torch.arange(site.channels // site.group).remainder(2).bool()
    keep = keep.repeat_interleave(site.group)
    (problem,) = problems(denoising, fresh, 1)
    dense = denoising.dense(problem)
    reader = unet.get_submodule(site.reader)
    weight = reader.weight.clone()
    reader.weight[:, ~keep] = 0
    expected = denoising.dense(problem)
    reader.weight.copy_(weight)
    remove_(unet, site, keep)
    assert torch.allclose(denoising.dense(problem), expected, atol=1e-6)
    assert (dense - expected).abs().max() > 1e-4
    assert reader.weight.shape[1] == site.channels // 2


def test_weights_are_counted_as_they_go(denoising: Denoising, sites: list[Site]) -> None:
    unet = denoising.model.unet
    for kind in ("inner", "hidden", "heads"):
        site = next(s for s in sites if s.kind.name == kind)
        before, each = sum(p.numel() for p in unet.parameters()), weights_per_channel(unet, site)
        remove_(unet, site, torch.arange(site.channels) < site.channels // 2)
        gone = before - sum(p.numel() for p in unet.parameters())
        assert gone == each * site.channels / 2


@pytest.mark.parametrize("left", [0.7, 0.85])
def test_as_many_weights_are_left_whatever_the_shares(
    model: DiffusionModel, denoising: Denoising, sites: list[Site], left: float
) -> None:
    unet = denoising.model.unet
    whole = sum(p.numel() for p in unet.parameters())
    g = torch.Generator().manual_seed(0)
    uneven = {site.name: 0.2 + 0.6 * torch.rand(1, generator=g).item() for site in sites}
    found = []
    for shares in (dict.fromkeys(uneven, 0.5), uneven):
        counts = kept_counts(unet, sites, shares, left)
        smaller = copy.deepcopy(unet)
        for site in sites:
            remove_(smaller, site, torch.arange(site.channels) < counts[site.name])
        assert sum(p.numel() for p in smaller.parameters()) / whole == pytest.approx(left, abs=0.01)
        found.append(counts)
    assert found[0] != found[1]


def test_the_hessian_is_that_of_what_a_reader_is_fed_and_later_steps_count_less(
    denoising: Denoising, sites: list[Site], fresh: FreshImages
) -> None:
    (problem,) = problems(denoising, fresh, 1)
    site = next(s for s in sites if s.kind.name == "inner")
    fed: list[Tensor] = []
    reader = denoising.model.unet.get_submodule(site.reader)
    hook = reader.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    # the noisiest step is the first and counts 1, the last counts 0.5
    problem = replace(problem, timesteps=torch.tensor([999, 0]))
    (hessian,) = hessians(denoising, [problem], [site])
    hook.remove()
    x = F.unfold(fed[0], 3, padding=1).transpose(1, 2)
    assert torch.allclose(hessian, x[0].T @ x[0] + 0.5 * x[1].T @ x[1], rtol=1e-4, atol=1e-4)


def test_obs_comes_nearer_to_dense_than_removing_the_same_channels_alone(
    denoising: Denoising, sites: list[Site], fresh: FreshImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = [site for site in sites if site.kind.name == "hidden"]
    given = problems(denoising, fresh, 8)
    dense = [denoising.dense(problem) for problem in given]
    kept = {site.name: site.channels // 2 for site in hidden}

    def error(updating: bool) -> float:
        unet = copy.deepcopy(denoising.model.unet)
        smaller = Denoising(replace(denoising.model, unet=unet), 0)
        with monkeypatch.context() as patch:
            if not updating:
                plain = lambda w, *others: (removed(w, *others)[0], w.clone())  # noqa: E731
                patch.setattr(made, "removed", plain)
            obs_(smaller, given, hidden, kept)
        pairs = zip(given, dense, strict=True)
        return sum(F.mse_loss(smaller.dense(p), d).item() for p, d in pairs)

    assert error(updating=True) < 0.5 * error(updating=False)


def test_fine_tuning_lowers_the_loss_and_changes_weights_for_good(
    denoising: Denoising, fresh: FreshImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "LEARNING_RATE", 1e-2)
    unet = denoising.model.unet
    before = copy.deepcopy(unet.state_dict())
    losses = fine_tune_(denoising, fresh.batches(list(range(16)), 8, seed=0, epochs=None), 30)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())


def test_every_rival_stands_beside_its_gates_and_leaves_the_model_alone(
    model: DiffusionModel, fresh: FreshImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "SAMPLES", 4)
    monkeypatch.setattr(made, "TIMESTEPS", 2)
    g = torch.Generator().manual_seed(0)
    topology = topology_of(model.unet)
    scores = {s.name: torch.rand(s.channels, generator=g) for s in topology.sites("all+ff")}
    gates, denoising = Gates(scores, topology=topology), Denoising(model, 0)
    (problem,) = problems(denoising, fresh, 1)
    before, objects = denoising.dense(problem), list(model.unet.parameters())
    given = (0.8, denoising, fresh, list(range(16)), 1, 0)
    found = rivals(made.KINDS, "a", Candidate(gates), *given)
    assert list(found) == [
        "a-obs-per-layer",
        "a-structural-per-layer",
        "a-obs-global",
        "a-structural-global",
    ]
    outputs = []
    for rival in found.values():
        with rival.running(model.unet) as size:
            outputs.append(denoising.dense(problem))
        whole = sum(p.numel() for p in model.unet.parameters())
        share = rival.counted(whole, 16)["parameters_left"]
        assert share == pytest.approx(0.8, abs=0.01) and size == pytest.approx(4 * share * whole)
        assert rival.described()["beside"] == "a"
    assert not any(torch.equal(a, b) for a in outputs for b in outputs if a is not b)
    assert not any(torch.equal(output, before) for output in outputs)
    assert torch.equal(denoising.dense(problem), before)
    assert all(a is b for a, b in zip(objects, model.unet.parameters(), strict=True))
    assert len({rival.stamp() for rival in found.values()}) == 4


def test_gates_of_which_a_rival_could_prune_nothing_are_refused(
    model: DiffusionModel, fresh: FreshImages
) -> None:
    topology = topology_of(model.unet)
    residual = next(site for site in topology.sites() if site.reader is None)
    gates = Gates({residual.name: torch.zeros(residual.channels)}, topology=topology)
    with pytest.raises(UserError, match="prunes no channels that another layer reads"):
        rivals(("obs",), "a", Candidate(gates), 0.9, Denoising(model, 0), fresh, [0], 1, 0)
