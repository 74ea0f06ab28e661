"""The benchmark: it says what it measured, refuses what it could not, and times what it names."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldcp_core import PADDINGS, Gates, PrunedSite, SoftGate, Topology, save_gates
from ldcp_core.diffusers import compact_blocks, topology_of
from training import benchmark as command
from training.benchmark import BenchmarkConfig, benchmark, check, main, parse, save
from training.benchmarking.markdown import render, shown_ratio
from training.benchmarking.timing import DENSE, Variant, interleaved, sign_interval, summary
from training.benchmarking.variants import (
    Inputs,
    Pruning,
    fill_,
    random_pruning,
    random_unet,
    replaced_weights,
    unet_variants,
)
from training.errors import UserError
from training.model.gating import masked, running

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """SD1.5's topology, 32 channels at the most."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    fill_(unet, seed=3)
    return unet.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def inputs(unet: UNet2DConditionModel) -> Inputs:
    return Inputs.random(unet, batch=2, latent_side=16, seed=1)


def with_constants(unet: UNet2DConditionModel, share: float = 0.5) -> Pruning:
    generator = torch.Generator().manual_seed(5)
    pruning = random_pruning(topology_of(unet).sites(), share, seed=2)
    constants = {
        s: torch.randn(k.numel(), generator=generator) for s, k in pruning.keep_sets.items()
    }
    return replace(pruning, constants=constants)


def outputs(chosen: list[Variant]) -> dict[str, torch.Tensor]:
    found = {}
    for variant in chosen:
        with variant.prepare():
            found[variant.name] = variant.evaluate()
    return found


# --- statistics -----------------------------------------------------------------------------------


def test_the_interval_drops_as_many_extremes_as_the_binomial_distribution_allows() -> None:
    # n = 12: 2·(1 + 12 + 66)/4096 = 3.9% lies outside the third values, 2·299/4096 = 14.6% outside
    # the fourth ones
    assert sign_interval([float(i) for i in range(12, 0, -1)]) == (3.0, 10.0)
    # n = 8: 2·1/256 = 0.8% outside the extremes, 2·9/256 = 7.0% outside the second ones
    assert sign_interval([float(i) for i in range(1, 9)]) == (1.0, 8.0)


def test_ratios_are_paired_per_round_so_that_drift_cancels() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    shares = [0.5, 0.5, 0.5, 0.75, 0.75, 0.75]
    times = [share * value for share, value in zip(shares, drift, strict=True)]
    rows = summary({DENSE: drift, "less": times})
    # the median of the ratios is (0.5 + 0.75)/2; that of the medians would be 4/6
    assert rows["less"]["ratio"] == 0.625
    assert rows["less"]["interval"] == [0.5, 0.75]
    # median of the six is (4 + 8)/2 = 6; deviations 5, 4, 2, 2, 10, 26, their median 4.5
    assert (rows[DENSE]["median"], rows[DENSE]["deviation"]) == (6.0, 4.5)


def test_an_effect_below_the_noise_gets_no_ratio() -> None:
    noisy = [0.97, 1.04, 0.99, 1.02, 0.98, 1.01]
    row = {"name": "noisy"} | summary({DENSE: [1.0] * 6, "noisy": noisy})["noisy"]
    assert row["ratio"] is None
    assert shown_ratio(row) == "within noise (±4.0%)"


def test_an_effect_above_the_noise_gets_its_ratio_and_interval() -> None:
    clear = [0.97, 0.94, 0.99, 0.92, 0.98, 0.91]  # as wide a spread as above, all below 1
    row = {"name": "clear"} | summary({DENSE: [1.0] * 6, "clear": clear})["clear"]
    assert math.isclose(row["ratio"], 0.955)
    assert shown_ratio(row) == "0.955 (0.910 to 0.990)"


def test_five_rounds_are_too_few_for_any_ratio() -> None:
    row = {"name": "fast"} | summary({DENSE: [1.0] * 5, "fast": [0.1] * 5})["fast"]
    assert row["ratio"] is None
    assert shown_ratio(row) == "too few rounds (six are needed)"


def test_every_round_runs_every_variant_once_in_an_order_that_changes() -> None:
    seen: list[str] = []
    four = [Variant(name, "", lambda: None) for name in "abcd"]

    def seconds(variant: Variant) -> float:
        seen.append(variant.name)
        return float(len(seen))

    times = interleaved(four, rounds=8, seed=0, seconds=seconds)
    rounds = ["".join(seen[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(done) == list("abcd") for done in rounds)
    assert len(set(rounds)) > 3
    assert times["a"] == [4 * i + done.index("a") + 1 for i, done in enumerate(rounds)]


# --- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
def test_pruned_on_equals_the_masked_reference(
    unet: UNet2DConditionModel, inputs: Inputs, padding: str
) -> None:
    pruning = with_constants(unet)
    found = outputs(unet_variants(unet, inputs, [pruning], [padding]))
    gates = {s: SoftGate(k.float(), pruning.constants[s]) for s, k in pruning.keep_sets.items()}
    with masked(unet, gates, padding):
        reference = inputs.run(unet)
    assert (found[f"pruned on 50%, {padding}"] - reference).abs().max() < TOLERANCE
    assert (reference - found[DENSE]).abs().max() > 100 * TOLERANCE


def test_off_is_dense_bit_for_bit_and_mask_only_is_the_mask_with_zeros(
    unet: UNet2DConditionModel, inputs: Inputs
) -> None:
    pruning = with_constants(unet)
    found = outputs(unet_variants(unet, inputs, [pruning], ["zero"]))
    zeros = {s: SoftGate(k.float(), torch.zeros(32)) for s, k in pruning.keep_sets.items()}
    with masked(unet, zeros, "zero"):
        reference = inputs.run(unet)
    assert torch.equal(found["pruned off"], found[DENSE])
    assert torch.equal(found["mask-only 50%"], reference)
    assert (reference - found[DENSE]).abs().max() > 100 * TOLERANCE


def test_no_variant_leaves_anything_on_the_modules(
    unet: UNet2DConditionModel, inputs: Inputs
) -> None:
    outputs(unet_variants(unet, inputs, [with_constants(unet)], PADDINGS))
    assert not any("forward" in vars(module) for module in unet.modules())
    assert not any(module._forward_hooks for module in unet.modules())


def test_counted_bytes_follow_from_the_kept_channels(
    unet: UNet2DConditionModel, inputs: Inputs
) -> None:
    inner = Pruning("half", {"mid_block.resnets.0.conv1": torch.arange(32) < 16}, {})
    found = unet_variants(unet, inputs, [inner], PADDINGS)
    counted = {variant.name: variant.weight_bytes for variant in found}
    full = 2 * (9 * 32 * 32 + 32) * 4
    assert counted[DENSE] == counted["mask-only half"] == full
    # conv1: 16 rows and biases; conv2: 16 columns, all biases; the folded columns, nine taps or
    # one each; indices of the kept, of the pruned, and two for each kept as int64, a place for each
    # channel as int32, and two signs; 16 constants
    kept = (9 * 32 * 16 + 16 + 9 * 16 * 32 + 32) * 4 + 64 * 8 + 32 * 4 + 2 * 4 + 16 * 4
    assert counted["pruned on half, zero"] == kept + 9 * 16 * 32 * 4
    assert counted["pruned on half, extend"] == kept + 16 * 32 * 4
    assert counted["pruned off"] == full + counted["pruned on half, zero"]


def test_the_weights_that_may_be_moved_away_are_not_read_while_pruning(
    unet: UNet2DConditionModel, inputs: Inputs
) -> None:
    block = unet.mid_block.resnets[0]
    blocks = compact_blocks(unet, {"mid_block.resnets.0.conv2": PrunedSite(torch.arange(32) < 16)})
    weights = replaced_weights(unet, blocks)
    assert [id(w) for w in weights] == [id(w) for w in block.conv2.parameters()]  # not conv1's
    with running(unet, blocks):
        reference = inputs.run(unet)
        before = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.fill_(torch.nan)
            assert torch.equal(inputs.run(unet), reference)
        finally:
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)


def test_random_keep_sets_have_the_asked_share_in_multiples_of_eight() -> None:
    sites = Topology().sites()
    for share, kept in ((0.3, 896), (0.5, 640), (0.41, 752)):  # 0.59·1280 = 755.2
        pruning = random_pruning(sites, share, seed=0)
        assert all(abs(int(k.sum()) - kept) <= 8 for k in pruning.keep_sets.values())
        assert all(int(k.sum()) % 8 == 0 for k in pruning.keep_sets.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cheap_weights_are_finite_normal_numbers_and_do_not_repeat(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, unet: UNet2DConditionModel
) -> None:
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lambda *a, **k: dict(unet.config))
    small = random_unet(seed=0, dtype=dtype)
    assert {p.dtype for p in small.parameters()} == {dtype}
    values = torch.cat([p.flatten() for p in small.parameters()])
    assert values.isfinite().all()
    assert (values.abs()[values != 0] > torch.finfo(dtype).tiny).all()
    output = Inputs.random(small, 1, 16, 0).run(small)
    assert output.isfinite().all() and 0.01 < output.float().std() < 100
    rows = small.mid_block.resnets[0].conv1.weight.flatten(1)
    assert torch.unique(rows, dim=0).shape == rows.shape


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(unet: UNet2DConditionModel) -> dict:
    config = BenchmarkConfig(resolution=64, rounds=6, sparsity=(0.5,))
    return benchmark(config, unet, "python -m training.benchmark")


def test_the_report_has_every_raw_time_and_names_its_conditions(result: dict) -> None:
    names = [row["name"] for row in result["unet"]["rows"]]
    wanted = [DENSE, "pruned off", "mask-only 50%", *(f"pruned on 50%, {p}" for p in PADDINGS)]
    assert names == wanted
    assert all(len(row["seconds"]) == 6 for row in result["unet"]["rows"])
    assert all(len(row["seconds"]) == 24 for row in result["block"]["rows"])
    assert [row["name"] for row in result["block"]["rows"]] == [DENSE, *wanted[3:]]
    assert result["block"]["channels"] == 32
    identical = {row["name"]: row["identical"] for row in result["unet"]["rows"]}
    assert identical["pruned off"] and not identical["pruned on 50%, zero"]
    assert result["machine"]["packages"]["torch"] and result["machine"]["cores"]


def test_markdown_follows_from_the_json_alone_and_both_are_written(
    result: dict, tmp_path: Path
) -> None:
    json_path, markdown_path = save(result, str(tmp_path / "run"))
    again = json.loads(json_path.read_text(encoding="utf-8"))
    text = markdown_path.read_text(encoding="utf-8")
    assert render(again) == text
    for row in [*again["unet"]["rows"], *again["block"]["rows"]]:
        assert f"| {row['name']} | " in text and shown_ratio(row) in text
    assert again["criterion"] in text and again["machine"]["cpu"] in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.count("|") for line in table}
    assert columns == {11, 5}
    again["unet"]["rows"][1].update(ratio=0.123, interval=[0.1, 0.2])
    assert "0.123 (0.100 to 0.200)" in render(again)


def test_a_gate_file_decides_what_the_whole_unet_prunes(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    scores = {"mid_block.resnets.1.conv1": torch.arange(32) / 31}
    constants = {"mid_block.resnets.1.conv1": torch.ones(32)}
    path = tmp_path / "gates.safetensors"
    save_gates(Gates(scores, constants, "extend", topology_of(unet)), path)
    config = BenchmarkConfig(gates=str(path))
    prunings, paddings = command.chosen_prunings(config, unet)
    assert paddings == ("extend",)
    assert prunings[0].keep_sets["mid_block.resnets.1.conv1"].sum() == 16
    assert prunings[0].constants["mid_block.resnets.1.conv1"].eq(1).all()
    save_gates(Gates({"mid_block.resnets.1.conv1": torch.ones(1280)}), path)
    with pytest.raises(UserError, match="pass the model of these gates"):
        command.chosen_prunings(config, unet)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--resolution", "500"], "--resolution is 500.\n  Expected: pixels, a multiple of 64"),
        (["--sparsity", "30"], "--sparsity is 30.0.\n  Expected: between 0 and 1"),
        (["--rounds", "0"], "--rounds is 0.\n  Expected: 1 or more"),
        (["--batch", "-1"], "--batch is -1."),
        (["--threads", "0"], "--threads is 0."),
        (["--device", "tpu"], "--device tpu can't be used:"),
        (["--gates", "nope.safetensors"], "There is no file nope.safetensors."),
        (["--output", f"{__file__}/run"], f"{__file__} is no folder."),
    ],
)
def test_bad_options_are_explained_before_anything_is_loaded(
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(config: BenchmarkConfig) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(command, "load_unet", load)
    assert main(arguments) == 1
    assert text in capsys.readouterr().err


def test_quick_is_a_set_of_defaults_that_options_override() -> None:
    quick = parse(["--quick", "--rounds", "9", "--padding", "extend", "extend"])
    assert (quick.resolution, quick.rounds, quick.padding) == (64, 9, ("extend",))
    assert parse([]) == BenchmarkConfig()
    check(quick)
