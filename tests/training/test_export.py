"""An exported U-Net is smaller as counted, computes the same, and is read with suspicion."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from families import NO_ATTENTION, NO_MID, SMALL_XL, diffusers_unet, inputs, name_of
from safetensors.torch import load_file, save_file
from test_diffusers import SMALL_2, TOLERANCE, add_lora, evaluated, far, gates_of, reference
from torch import nn

from ldcp_core import Gates, Padding, Stage, Topology, load_gates, save_gates, savings
from ldcp_core.diffusers import UnsupportedModel, pruned
from ldcp_core.export import (
    WEIGHTS,
    ExportFileError,
    load_exported,
    save_exported,
)
from training import export
from training.errors import UserError
from training.model.gating import hard_gates, masked
from training.model.load import load_model
from training.options import DEMO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parents[2]
INNER, RESIDUAL = "*.resnets.*.conv1", "*.resnets.*.conv2"
SCOPES = (INNER, RESIDUAL, "all", "ff", "heads", "all+ff+heads")


@pytest.fixture
def unet(pipeline: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(pipeline / "unet")


@pytest.fixture(scope="module")
def written(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an export with everything in it."""
    found = tmp_path_factory.mktemp("written") / "pruned.safetensors"
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    save_exported(unet, gates_of(unet), found)
    return found.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pruned.safetensors"


def exported(unet: UNet2DConditionModel, gates: Gates, path: Path, **how: Any) -> Any:
    save_exported(unet, gates, path, **how)
    return load_exported(path)


@pytest.mark.parametrize("padding", ["zero", "extend"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_kind_is_the_pruned_and_the_masked_unet_and_as_small_as_counted(
    unet: UNet2DConditionModel, path: Path, scope: str, padding: Padding
) -> None:
    gates = replace(gates_of(unet, scope), padding=padding)
    dense, expected = evaluated(unet), reference(unet, gates)
    with pruned(unet, gates):
        in_place = evaluated(unet)
    smaller = exported(unet, gates, path)
    found = evaluated(smaller)
    assert far(found, expected) < TOLERANCE and far(found, in_place) < TOLERANCE
    assert far(dense, expected) > 100 * TOLERANCE

    kept = {site: int(keep.sum()) for site, keep in gates.keep_sets().items()}
    counted = savings(gates.topology, kept, padding)
    parameters = counted.unet.parameters - counted.saved.parameters
    if scope == RESIDUAL:  # conv2 has its bias beside what the output begins with
        parameters += sum(kept.values())
    assert sum(p.numel() for p in smaller.parameters()) == parameters
    keep_sets = sum(t.numel() for t in smaller.buffers() if t.dtype == torch.bool)
    assert keep_sets == sum(len(k) for site, k in gates.keep_sets().items() if "resnets" in site)
    assert sum(t.nbytes for t in load_file(path).values()) == 4 * parameters + keep_sets


@pytest.mark.parametrize("topology", [SMALL_2, SMALL_XL, NO_MID], ids=name_of)
@torch.no_grad()
def test_every_family_can_be_exported(topology: Topology, path: Path) -> None:
    torch.manual_seed(0)
    unet, given = diffusers_unet(topology, "cpu"), inputs(topology, 1, (8, 16), "cpu")
    gates = gates_of(unet)
    with masked(unet, hard_gates(gates.pruned()), "zero"):
        expected = unet(**given).sample
    found = exported(unet, gates, path)(**given).sample
    assert far(found, expected) < TOLERANCE


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_what_loses_nothing_stays_and_what_loses_all_is_a_constant(
    unet: UNet2DConditionModel, path: Path, padding: Padding
) -> None:
    gates = replace(gates_of(unet), padding=padding, corrections={})
    drawn, scores = random.Random(0), {}
    for site, score in gates.scores.items():
        scores[site] = drawn.choice([torch.ones_like(score), torch.zeros_like(score), score])
    gates = replace(gates, scores=scores)
    found = exported(unet, gates, path)
    assert far(evaluated(found), reference(unet, gates)) < TOLERANCE
    blocks = {type(found.get_submodule(block.name)).__name__ for block in gates.topology.blocks()}
    assert blocks == {"ResnetBlock2D", "PrunedResBlock", "Attention", "FeedForward", "Constant"}


def test_exporting_leaves_the_unet_as_it_was(unet: UNet2DConditionModel, path: Path) -> None:
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    weights = {name: (weight, weight.clone()) for name, weight in unet.named_parameters()}
    save_exported(unet, gates_of(unet), path)
    assert {name: dict(vars(module)) for name, module in unet.named_modules()} == before
    now = dict(unet.named_parameters())
    assert all(now[n] is was and torch.equal(was, copied) for n, (was, copied) in weights.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_full_weights_are_never_allocated(
    written: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(written)
    load, seen = UNet2DConditionModel.load_state_dict, []

    def look(unet: UNet2DConditionModel, *args: Any, **kwargs: Any) -> Any:
        seen.extend(weight.is_meta for weight in unet.parameters())
        return load(unet, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "load_state_dict", look)
    found = load_exported(path)
    assert seen and all(seen)
    assert not any(t.is_meta for t in (*found.parameters(), *found.buffers()))


def test_a_share_is_exported_by_rank(unet: UNet2DConditionModel, path: Path) -> None:
    gates = gates_of(unet, "all")
    with pruned(unet, gates, sparsity=0.25):
        expected = evaluated(unet)
    assert far(evaluated(exported(unet, gates, path, sparsity=0.25)), expected) < TOLERANCE


def test_it_can_be_copied_cast_trained_and_run_at_another_size(
    unet: UNet2DConditionModel, path: Path
) -> None:
    gates = gates_of(unet)
    found, expected = exported(unet, gates, path), reference(unet, gates)
    copied = copy.deepcopy(found)
    copied.up_blocks[3].resnets[2].shifts.data *= -3
    assert far(evaluated(copied), expected) > 100 * TOLERANCE
    half = exported(unet, gates, path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert 1e-4 < far(evaluated(half.float()), expected) < 0.05
    found(torch.randn(1, 4, 24, 8), 3, torch.randn(1, 7, 16)).sample.square().mean().backward()
    weights = [p for name, p in found.named_parameters() if "resnets" in name]
    assert weights and all(p.grad is not None for p in weights)
    given = torch.randn(1, 4, 24, 8), 3, torch.randn(1, 7, 16)
    single = found(*given).sample
    double = found.double()(given[0].double(), 3, given[2].double()).sample
    assert double.dtype == torch.float64 and far(double, single) < TOLERANCE
    assert far(evaluated(found.float()), expected) < TOLERANCE


class Sample(nn.Module):
    """The U-Net with tensors alone as arguments and result."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, t, text, return_dict=False)[0]


@torch.no_grad()
def test_it_is_a_graph_of_standard_operations(path: Path) -> None:
    unet = diffusers_unet(NO_ATTENTION, "cpu")  # but for that of the mid block: few of each kind
    gates = gates_of(unet)
    assert gates.padding == "zero"  # which needs one operation more than the other rule
    module = Sample(exported(unet, gates, path))
    given = torch.randn(2, 4, 16, 8), torch.tensor([5.0, 700.0]), torch.randn(2, 7, 768)
    expected = module(*given)
    program = torch.export.export(module, given)
    assert far(program.module()(*given), expected) < TOLERANCE
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    rare = ("scatter", "index_add", "index_put", "im2col", "batch_norm", "nonzero")
    assert called and [name for name in called if any(word in name for word in rare)] == []
    traced = torch.jit.trace(module, given, check_trace=False)
    assert far(traced(*given), expected) < TOLERANCE


# --- files ----------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> None:
    """Change tensors and metadata of an exported file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors, metadata = load_file(path), header["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def reconfigured(**settings: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})

    return change


BLOCK, FF = "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0.ff"
HEADS = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.clear(), "format and version"),
        (lambda t, m: m.update(format="ldcp.gates"), "expected .*ldcp.export"),
        (lambda t, m: m.update(version="2"), "expected .*'1'"),
        (lambda t, m: m.update(padding="reflect"), "padding rule reflect"),
        (lambda t, m: m.update(padding="extend"), "columns is torch.float32"),
        (lambda t, m: m.update(config="{"), "Expecting property name"),
        (lambda t, m: m.update(config="[]"), "not that of a U-Net"),
        (lambda t, m: m.update(config="[" * 10**5), "recursion|not that of a U-Net"),
        (reconfigured(layers_per_block=10**9), "more blocks than any has"),
        (reconfigured(transformer_layers_per_block=[[10**9]]), "more blocks than any has"),
        (reconfigured(reverse_transformer_layers_per_block=[[99] * 3] * 4), "more blocks than any"),
        (reconfigured(down_block_types=["DownBlock2D"] * 10**5), "more blocks than any has"),
        (reconfigured(down_block_types=["os.system"] * 4), "not that of a U-Net"),
        (reconfigured(block_out_channels=[16, 16, 32, 64]), "keep-set|expected"),
        (lambda t, m: t.pop(f"{BLOCK}.conv1.weight"), "lacks the tensor mid_block"),
        (lambda t, m: t.pop(f"{BLOCK}.inner.keep"), "it (lacks|is not to have) the tensor"),
        (lambda t, m: t.pop(f"{FF}.net.2.weight"), "has 0 channels"),
        (lambda t, m: t.update(other=torch.zeros(1)), "not to have the tensor other"),
        (lambda t, m: t.update({f"{BLOCK}.inner.keep": torch.ones(32)}), "keep-set"),
        (lambda t, m: t.update({f"{BLOCK}.inner.keep": torch.ones(31).bool()}), "keep-set"),
        (lambda t, m: t.update({f"{BLOCK}.shifts": torch.ones(32).long()}), "torch.int64"),
        (lambda t, m: t.update({f"{FF}.net.2.weight": torch.ones(32, 999)}), "has 999 channels"),
        (lambda t, m: t.update({f"{FF}.net.2.weight": torch.tensor(1.0)}), "channels|expected"),
        (lambda t, m: t.update({f"{HEADS}.to_out.0.weight": torch.ones(32, 7)}), "has 7 channels"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_written_is_refused(
    written: bytes, path: Path, change: Any, message: str
) -> None:
    path.write_bytes(written)
    rewritten(path, change)
    with pytest.raises(ExportFileError, match=message) as error:
        load_exported(path)
    assert str(path) in str(error.value) and "export it again" in str(error.value)


class Evil:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", pickle.dumps(Evil()), b"\xff" * 99])
def test_what_is_no_safetensors_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ExportFileError, match="not a usable exported U-Net"):
        load_exported(path)


def test_other_files_and_folders_are_refused(written: bytes, path: Path, pipeline: Path) -> None:
    path.write_bytes((ROOT / "tests/core/golden/gates_v1.safetensors").read_bytes())
    for other in (path, pipeline, pipeline / "unet", pipeline / "vae" / "config.json"):
        with pytest.raises(ExportFileError, match="not a usable exported U-Net"):
            load_exported(other)
    for missing in (path.parent, path.parent / "none"):
        with pytest.raises(ExportFileError, match="there is no such file"):
            load_exported(missing)
    path.write_bytes(written[:-100])
    with pytest.raises(ExportFileError, match="not a usable exported U-Net"):
        load_exported(path)


def test_what_is_pruned_already_or_in_stages_or_has_a_lora_is_refused(
    unet: UNet2DConditionModel, path: Path
) -> None:
    gates = gates_of(unet)
    found = exported(unet, gates, path)
    for use in (pruned, lambda *given: save_exported(*given, path)):
        with pytest.raises(UnsupportedModel, match="the U-Net that it was made of"):
            use(found, gates)
    with pytest.raises(UnsupportedModel, match="made for"):
        save_exported(diffusers_unet(SMALL_XL, "cpu"), gates, path)
    staged = replace(gates, stages=(Stage(0.0, None), Stage(0.5, 0.5)))
    with pytest.raises(UnsupportedModel, match="the gates have 2 stages"):
        save_exported(unet, staged, path)
    add_lora(unet)
    with pytest.raises(UnsupportedModel, match="Fuse and unload LoRA"):
        save_exported(unet, gates, path)
    assert far(evaluated(load_exported(path)), evaluated(found)) == 0  # neither overwrote it


def test_a_lora_works_or_is_refused_but_never_ignored(
    unet: UNet2DConditionModel, path: Path
) -> None:
    from peft import LoraConfig

    found = exported(unet, gates_of(unet), path)
    plain = evaluated(found)
    for layers, refused in ((["to_q", "ff.net.2", "time_emb_proj"], False), (["conv1"], True)):
        config = LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
        found.add_adapter(config, adapter_name="of" + layers[0])
        if refused:
            with pytest.raises(UnsupportedModel, match="put it on other layers"):
                evaluated(found)
        else:
            assert far(evaluated(found), plain) > 1e-3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_it_as_any_new_file(unet: UNet2DConditionModel, path: Path) -> None:
    plain = path.with_name("plain")
    plain.touch()
    save_exported(unet, gates_of(unet), path)
    assert path.stat().st_mode == plain.stat().st_mode


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates on the demo model, of all kinds and with corrections."""
    found = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    gates = gates_of(UNet2DConditionModel.from_pretrained(DEMO / "pipeline" / "unet"))
    save_gates(gates, found)
    return found


def test_the_folder_is_a_pipeline_that_draws_the_same_images(
    gate_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "pruned"
    for _ in range(2):  # it may replace what it wrote
        assert export.main([str(gate_file), "--demo", "--output", str(folder)]) == 0
    assert f"wrote {folder}; the U-Net takes" in capsys.readouterr().out
    sizes = [(root / "unet" / WEIGHTS).stat().st_size for root in (folder, DEMO / "pipeline")]
    assert sizes[0] < 0.7 * 2 * sizes[1]  # the demo's weights are stored in half precision
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        StableDiffusionPipeline.from_pretrained(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=load_exported(folder))
    pipe.set_progress_bar_config(disable=True)

    def image() -> torch.Tensor:
        size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
        return pipe("a face", generator=torch.manual_seed(0), **size).images

    found = image()
    pipe.unet = load_model(str(DEMO / "pipeline")).unet
    dense = image()
    with pruned(pipe.unet, gate_file):
        expected = image()
    assert float((found - expected).abs().max()) < TOLERANCE
    assert float((dense - expected).abs().max()) > 100 * TOLERANCE


def test_one_file_holds_the_unet_alone_in_the_precision_asked_for(
    gate_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pruned.safetensors"
    options = [str(gate_file), "--demo", "--precision", "fp16", "--sparsity", "0.25"]
    assert export.main([*options, "--output", str(file)]) == 0
    found = load_exported(file)
    assert found.dtype == torch.float16 and [*tmp_path.iterdir()] == [file]
    keep = load_gates(gate_file).keep_sets_at(0.25)["mid_block.resnets.0.conv1"]
    assert torch.equal(found.mid_block.resnets[0].inner.keep, keep)


def test_an_export_is_no_model_to_learn_on(written: bytes, path: Path, pipeline: Path) -> None:
    path.write_bytes(written)
    folder = shutil.copytree(pipeline, path.parent / "pruned")
    (folder / "unet" / WEIGHTS).write_bytes(written)
    for model in (path, folder):
        with pytest.raises(UserError, match=r"a pruned U-Net by training.export(.|\n)*was made of"):
            load_model(str(model))


def test_a_folder_of_something_else_is_left_alone(
    gate_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert export.main([str(gate_file), "--demo", "--output", str(tmp_path)]) == 1
    assert "is not empty, and holds no export" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
