"""Unstructured baselines: which weights go to zero, that they save nothing, that all comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.benchmarking.variants import Inputs, unet_bytes
from training.errors import UserError
from training.evaluation.unstructured import AMOUNTS, Unstructured, unstructured_of, zeroed
from training.model.load import DiffusionModel


def two_layers() -> nn.Module:
    found = nn.Sequential(nn.Linear(4, 1), nn.SiLU(), nn.Conv2d(4, 1, 1))
    found[0].weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    found[2].weight.data = torch.tensor([-10.0, 20.0, 0.5, 40.0]).view(1, 4, 1, 1)
    return found.requires_grad_(False)


def nonzero(module: nn.Module) -> list[list[float]]:
    return [[w for w in module[i].weight.flatten().tolist() if w != 0] for i in (0, 2)]


def test_l1_ranks_all_layers_together() -> None:
    module = two_layers()
    with zeroed(module, "l1", 0.5):  # of 0.5 1 2 3 4 10 20 40 the first four
        assert nonzero(module) == [[-4.0], [-10.0, 20.0, 40.0]]


def test_sensitivity_is_in_standard_deviations_of_the_layer() -> None:
    # 1, −2, 3, −4: mean −0.5, mean square 7.5, σ = √7.25 = 2.69. −10, 20, 0.5, 40: mean 12.625,
    # mean square 525.06, σ = √365.67 = 19.12
    module = two_layers()
    with zeroed(module, "sensitivity", 1.0):
        assert nonzero(module) == [[3.0, -4.0], [20.0, 40.0]]
    with zeroed(module, "sensitivity", 0.5):  # thresholds 1.35 and 9.56
        assert nonzero(module) == [[-2.0, 3.0, -4.0], [-10.0, 20.0, 40.0]]


def test_percentage_takes_the_same_share_of_every_layer() -> None:
    module = two_layers()
    with zeroed(module, "percentage", 25):
        assert nonzero(module) == [[-2.0, 3.0, -4.0], [-10.0, 20.0, 40.0]]


@pytest.mark.parametrize("kind", AMOUNTS)
def test_afterwards_the_model_is_itself(model: DiffusionModel, kind: str) -> None:
    unet = model.unet
    inputs = Inputs.random(unet, 2, 8, seed=0)
    dense, state = inputs.run(unet), {k: v.clone() for k, v in unet.state_dict().items()}
    before = list(unet.named_parameters())
    with pytest.raises(ZeroDivisionError):
        with Unstructured(kind, AMOUNTS[kind][-1]).running(unet) as size:
            assert size == unet_bytes(unet)  # zeros are stored like any other weight
            assert not torch.equal(inputs.run(unet), dense)
            raise ZeroDivisionError
    after = list(unet.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(inputs.run(unet), dense)


def test_an_error_while_pruning_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.evaluation import unstructured

    module = two_layers()
    before = dict(module.named_parameters())
    pruned, count = unstructured._without_smallest, []

    def fail(values: torch.Tensor, share: float) -> torch.Tensor:
        if count:
            raise MemoryError
        count.append(1)
        return pruned(values, share)

    monkeypatch.setattr(unstructured, "_without_smallest", fail)
    with pytest.raises(MemoryError), zeroed(module, "percentage", 50):
        pass
    assert all(dict(module.named_parameters())[name] is p for name, p in before.items())
    assert nonzero(module) == [[1.0, -2.0, 3.0, -4.0], [-10.0, 20.0, 0.5, 40.0]]


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_table_says_what_is_left_of_each_layer(model: DiffusionModel, precision: str) -> None:
    one = Unstructured("percentage", 50, precision)
    with one.running(model.unet):
        rows = one.layers(model.unet)
    first = rows[0]
    weight = model.unet.conv_in.weight
    assert (first["layer"], first["type"]) == ("conv_in", "Conv2d")
    assert first["parameters"] == weight.numel()
    assert first["nonzero"] == pytest.approx(weight.numel() / 2, abs=8)
    assert first["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert {row["type"] for row in rows} == {"Conv2d", "Linear"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magnitude", "l1, sensitivity, percentage"),
        ("l1=1.5", "above 0 and below 1"),
        ("l1=a", "amounts of l1"),
        ("percentage=0", "above 0 and below 100"),
    ],
)
def test_bad_amounts_are_answered(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        unstructured_of([text], "fp32")
