"""Compare Pruning Shares: every image is KSampler's own, every figure that of its run."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import comfy_server
import numpy
import pytest
import torch
from gated import unload, weights_left_out
from PIL import Image
from small_model_node import SmallVae

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
ID = "LDCPCompareShares"
VAE = SmallVae()
#: the height of a column's caption and what is around it may change, the place of its image not
GAP, COLUMN = 16, 256


@pytest.fixture
def node(comfy, tmp_path, monkeypatch):
    """The node, whose previews go into a folder of this test."""
    monkeypatch.setattr(comfy.folder_paths, "temp_directory", str(tmp_path))
    return comfy.nodes.NODE_CLASS_MAPPINGS[ID]


@pytest.fixture
def compare(node, sampling):
    """Execute the node: (grid, images, text)."""

    def run(model, gates, shares="0.5", schedules="", vae=VAE, **changes):
        chosen = sampling(**{"steps": 3, **changes})
        return node.execute(
            model=model, gates=gates, vae=vae, shares=shares, schedules=schedules, **chosen
        ).args

    return run


@pytest.fixture
def by_hand(comfy, sampling):
    """The image of KSampler and VAE Decode, behind Apply Dynamic Pruning where gates are given."""

    def run(model, gates=None, share=None, steps="0-", **changes):
        if gates is not None:
            apply = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"]
            schedule = comfy.core.Schedule.steps(steps)
            channels = "as learned" if share is None else "a share"
            options = {"schedule": schedule, "channels": channels}
            (model,) = apply.execute(model, gates, share or 0.0, **options).args
        (latent,) = comfy.nodes.KSampler().sample(model, **sampling(**{"steps": 3, **changes}))
        return comfy.nodes.VAEDecode().decode(VAE, latent)[0]

    return run


@pytest.fixture
def variants(comfy):
    return importlib.import_module(f"{comfy.apply_node.__package__}.variants")


@pytest.fixture
def no_sampling(comfy, monkeypatch):
    """Whatever is sampled fails the test."""
    monkeypatch.setattr(comfy.nodes, "common_ksampler", lambda *_, **__: pytest.fail("sampled"))


def pixels(file):
    return numpy.array(Image.open(io.BytesIO(file)))


def rows(text):
    """Name and steps -> (pruned, seconds, ratio, weights, RMSE) of the table."""
    found = {}
    for line in text.split("\n\n")[0].splitlines()[2:]:
        name, pruned, seconds, ratio, weights, rmse, steps = re.fullmatch(
            r"(.{12}) (.{7}) (.{8}) (.{8}) (.{18}) (.{6})(.*)", line
        ).groups()
        figures = (pruned, float(seconds), float(ratio), weights.strip(), float(rmse))
        found[name.strip(), steps.strip()] = figures
    return found


def test_the_full_model_is_ksamplers_own_image_bit_for_bit(model, make_gates, compare, by_hand):
    _, images, _ = compare(model, make_gates())
    assert torch.equal(images[:1], by_hand(model))


def test_every_image_is_that_of_apply_dynamic_pruning_and_ksampler(
    model, make_gates, compare, by_hand
):
    gates = make_gates()
    _, images, _ = compare(model, gates, "learned, 0, 0.25 1.0", "0-\n\n1-", batch=2)
    expected = [by_hand(model, batch=2)]
    for steps in ("0-", "1-"):
        for share in (None, 0.25, 1.0):
            expected.append(by_hand(model, gates, share, steps, batch=2))
    assert torch.equal(images, torch.cat(expected))
    for i, one in enumerate(expected):  # none can be taken for another
        assert all((one - other).abs().max() > 1e-4 for other in expected[:i])


def test_a_schedule_that_has_no_single_step_is_compared(model, make_gates, compare, by_hand):
    chosen = {"scheduler": "kl_optimal", "sampler_name": "dpmpp_2m_sde"}
    _, images, _ = compare(model, make_gates(), **chosen)
    assert torch.equal(images[:1], by_hand(model, **chosen))


def test_pruning_connected_before_it_is_left_out(comfy, model, make_gates, compare, by_hand):
    earlier = make_gates(seed=8)
    layer = comfy.patch.Layer(earlier, earlier.keep_sets())
    patched, gates = comfy.patch.attach(model, layer), make_gates()
    assert not torch.equal(by_hand(patched), by_hand(model))
    _, images, _ = compare(patched, gates)
    assert torch.equal(images, torch.cat([by_hand(model), by_hand(model, gates, 0.5)]))
    assert comfy.patch.attached(patched).layers == (layer,)


def test_the_difference_is_the_rmse_of_the_images(model, make_gates, compare):
    _, images, text = compare(model, make_gates(), "0.25, 0.75", batch=2)
    found = rows(text)
    for place, name in enumerate(("full model", "share 0.25", "share 0.75")):
        steps = "all steps" if place else ""
        # over both images: 255 * sqrt(mean of squares)
        squares = (images[2 * place : 2 * place + 2] - images[:2]).double().square()
        assert found[name, steps][4] == pytest.approx(255 * float(squares.mean().sqrt()), abs=0.051)
    assert 0.1 < found["share 0.25", "all steps"][4] < found["share 0.75", "all steps"][4]


def test_the_difference_is_in_levels_from_0_to_255(node):
    compare = sys.modules[f"{node.__module__.rpartition('.')[0]}.compare"]
    images = torch.zeros(2, 4, 4, 3)
    images[0], images[1, :, :2] = 0.2, 0.2
    # 255 * 0.2, and 255 * sqrt(0.04 / 2)
    expected = torch.tensor([51.0, 36.0624])
    assert torch.allclose(compare.difference(images, torch.zeros(2, 4, 4, 3)), expected)


def test_the_share_that_came_out_is_said(model, make_gates, compare):
    gates = make_gates()
    found = rows(compare(model, gates, "learned, 0.1, 1")[2])
    # 512 channels: a tenth, in multiples of 8 of which 0.1 is nearest to 48 or 56
    assert found["full model", ""][0].strip() == "0.0%"
    assert found["learned", "all steps"][0].strip() == f"{gates.sparsity:.1%}"
    assert found["share 0.1", "all steps"][0].strip() in (f"{n / 512:.1%}" for n in (48, 56))
    assert found["share 1", "all steps"][0].strip() == "100.0%"


def test_the_bytes_are_those_measured_while_it_ran(
    comfy, small_model, make_gates, compare, device, memory
):
    model, gates = small_model(), make_gates()
    model.load_device = device
    text = compare(model, gates, "learned", "0-\n0")[2]
    saved = rows(text)["learned", "all steps"][3]
    expected = weights_left_out(comfy.patch.Layer(gates, gates.keep_sets()))
    assert saved.endswith(" MiB less")
    assert float(saved.split()[0]) == pytest.approx(expected / 2**20, rel=0.05, abs=0.06)
    # with steps in full the full weights stay, and the compact ones come on top
    assert rows(text)["learned", "steps 0"][3].endswith(" more")
    assert "note     full weights stayed: some steps are not pruned" in text
    unload(comfy, device)


def test_the_first_run_which_loads_the_model_is_not_timed(
    comfy, model, make_gates, compare, monkeypatch
):
    sampler, clock, calls = comfy.nodes.common_ksampler, [100.0], []

    def slow(model, **sampling):
        result = sampler(model, **sampling)
        clock[0] += (50.0, 6.0, 4.0, 3.0)[len(calls)]  # seconds; the first loads
        calls.append(sampling["steps"])
        return result

    monkeypatch.setattr(comfy.nodes, "common_ksampler", slow)
    compare_module = sys.modules[f"{comfy.apply_node.__package__}.compare"]
    monkeypatch.setattr(compare_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = rows(compare(model, make_gates(), "0.5")[2])
    assert calls == [2, 2, 3, 3]
    assert found["full model", ""][1:3] == (4.0, 1.0)
    assert found["share 0.5", "all steps"][1:3] == (3.0, 0.75)


def test_what_takes_no_tick_of_a_coarse_clock_is_compared(
    comfy, model, make_gates, compare, monkeypatch
):
    """As the monotonic clock of Windows, whose tick is 15 ms, has it."""
    clock = SimpleNamespace(monotonic=lambda: 100.0, perf_counter=time.perf_counter)
    compare_module = sys.modules[f"{comfy.apply_node.__package__}.compare"]
    monkeypatch.setattr(compare_module, "time", clock)
    found = rows(compare(model, make_gates(), denoise=0.0)[2])
    assert found["full model", ""][2] == 1.0


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_at_the_first_use_of_a_pruned_model_is_not_timed(
    comfy, model, make_gates, compare, monkeypatch, compiled
):
    """Kernels are compiled once, and a compiled U-Net for each share."""
    sampler, clock, known = comfy.nodes.common_ksampler, [100.0], set()
    if compiled:
        kind = comfy.root.patcher_extension.WrappersMP.APPLY_MODEL
        model = model.clone()
        model.add_wrapper_with_key(
            kind, "torch.compile", lambda executor, *a, **k: executor(*a, **k)
        )

    def slow(model, **sampling):
        result, pruning = sampler(model, **sampling), comfy.patch.attached(model)
        clock[0] += 4.0
        if pruning is not None and pruning.record.pruned_evaluations:
            (layer,) = pruning.layers
            kept = sum(int(keep.sum()) for keep in layer.keep_sets.values()) if compiled else 0
            clock[0] += 50.0 * (kept not in known)
            known.add(kept)
        return result

    monkeypatch.setattr(comfy.nodes, "common_ksampler", slow)
    compare_module = sys.modules[f"{comfy.apply_node.__package__}.compare"]
    monkeypatch.setattr(compare_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = rows(compare(model, make_gates(), "0.25, 0.5", "2\n0-")[2])
    assert [row[1] for row in found.values()] == [4.0] * 5


def test_the_grid_shows_every_image_at_its_place_with_a_caption(model, make_gates, compare):
    grid, images, _ = compare(model, make_gates(), "0.25, 0.75", "0-\n1-", batch=2)
    assert grid.dtype == torch.float32 and len(grid) == 2
    # three columns: the full model and two shares
    assert grid.shape[2] == GAP + 3 * (COLUMN + GAP)
    height = (grid.shape[1] - GAP) // 2
    for number in range(2):
        order = [[0, 1, 2], [0, 3, 4]]  # of the single images, which come in batches of 2
        for row, places in enumerate(order):
            for column, place in enumerate(places):
                image, left = images[2 * place + number], GAP + column * (COLUMN + GAP)
                strip = grid[number, GAP + row * height :, left : left + 128][:height]
                (top,) = (
                    y
                    for y in range(height - 128)
                    if (strip[y : y + 128] - image).abs().max() < 0.51 / 255
                )
                assert strip[top + 128 :].std() > 0.05  # letters below it


def test_a_caption_fits_its_column(node):
    grid = sys.modules[f"{node.__module__.rpartition('.')[0]}.grid"]
    cell = grid.Cell(torch.ones(64, 64, 3), "0" * 34, ["0" * 30])
    drawn = grid.draw([("", [cell, cell])])
    caption, between = drawn[GAP + 64 :, GAP:][:, :COLUMN], drawn[:, GAP + COLUMN :][:, :GAP]
    assert (between == between[0, 0]).all() and caption.std() > 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.2, 0.4", [0.2, 0.4]),
        ("0.4 0.2\n0.4;", [0.4, 0.2]),
        ("Learned, 1, 0", [None, 1.0]),
        ("1e-1", [0.1]),
    ],
)
def test_shares_are_read_in_their_order(variants, text, found):
    assert variants.parse_shares(text) == found


def test_schedules_are_read_line_by_line(comfy, variants):
    parse = comfy.core.Schedule.steps
    assert variants.parse_schedules(" \n") == [comfy.core.ALWAYS]
    assert variants.parse_schedules("0-4, 10-19\n\n5-\n5-") == [parse("0-4, 10-19"), parse("5-")]
    assert variants.parse_schedules("0-4, 90-", 5) == [parse("0-4, 90-")]  # a part prunes


@pytest.mark.parametrize(
    ("changes", "found", "advice"),
    [
        ({"shares": ""}, "nothing to compare", "write shares"),
        ({"shares": "0, 0.0"}, "nothing to compare", "write shares"),
        ({"shares": "20"}, "'20'", "from 0.0 to 1.0"),
        ({"shares": "0,2"}, "'2'", "with a point"),
        ({"shares": "nan"}, "'nan'", "from 0.0 to 1.0"),
        ({"shares": "-0.1"}, "'-0.1'", "from 0.0 to 1.0"),
        ({"shares": "some"}, "'some'", "'learned'"),
        ({"shares": 0.3}, "shares is 0.3", "write a text"),
        ({"schedules": "0-\n9-4"}, "line 2: step range '9-4' is reversed", "write '4-9'"),
        ({"schedules": "3-"}, "steps 3- lies past the last of 3 steps", "steps of this run"),
        ({"schedules": None}, "schedules is None", "write a text"),
        (
            {"shares": " ".join(f"0.{n}" for n in range(10, 35)), "schedules": "0\n1"},
            "25 shares at 2 schedules and the full model make 51 images",
            "at most 50",
        ),
        ({"sampler_name": "some"}, "sampler_name is 'some'", "choose one of"),
        ({"scheduler": "some"}, "scheduler is 'some'", "choose one of"),
        ({"vae": None}, "no VAE", "connect Load VAE"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_sampled(
    model, make_gates, compare, no_sampling, changes, found, advice
):
    with pytest.raises(ValueError) as caught:
        compare(model, make_gates(), **changes)
    assert found in str(caught.value) and advice in str(caught.value)


def test_gates_of_another_model_are_refused_before_anything_is_sampled(
    comfy, model, make_gates, compare, no_sampling
):
    with pytest.raises(comfy.model.ModelError, match="the model has 128"):
        compare(model, make_gates(topology=comfy.core.SD15))


def test_what_is_known_before_the_run_is_checked_before_it(node):
    problem = sys.modules[node.__module__].problem
    assert problem("0.2", "5-", 20) is None
    assert problem(None, None, None) is None and problem("0.2", None, ["7", 0]) is None
    assert "'2'" in problem("2", None, None)
    assert "past the last" in problem(None, "20-", 20)
    assert node.validate_inputs("0.2") is True and "'x'" in node.validate_inputs("x")


def test_an_interrupt_ends_it_and_leaves_the_model_as_it_was(
    comfy, model, make_gates, compare, by_hand, monkeypatch
):
    management, expected, steps = comfy.root.model_management, by_hand(model), []

    def hook(step, *_, **__):  # as the server's: it looks whether somebody has pressed stop
        steps.append(step)
        if len(steps) == 2 + 2 + 3 + 2:  # first uses, the full model, two steps of the first share
            management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.root.utils, "PROGRESS_BAR_HOOK", hook)
    # newer hosts leave out updates that come too soon
    monkeypatch.setattr(comfy.root.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    with pytest.raises(management.InterruptProcessingException):
        compare(model, make_gates(), "0.25, 0.5")
    assert steps == [1, 2, 1, 2, 1, 2, 3, 1, 2]
    assert not [m for m in model.model.diffusion_model.modules() if "forward" in vars(m)]
    assert torch.equal(by_hand(model), expected)


def test_an_interrupt_is_noticed_between_two_decodings(comfy, model, make_gates, compare):
    management = comfy.root.model_management

    class Stopped:
        decoded = 0

        def decode(self, samples):
            self.decoded += 1
            management.interrupt_current_processing()
            return VAE.decode(samples)

    vae = Stopped()
    with pytest.raises(management.InterruptProcessingException):
        compare(model, make_gates(), "0.25, 0.5", vae=vae)
    assert vae.decoded == 1


def test_what_a_run_noticed_is_said_once(model, make_gates, compare):
    text = compare(model, make_gates(), "0.25, 0.5", "0, 9")[2]
    notes = [line for line in text.splitlines() if line.startswith("note")]
    past = "this run has 3 steps (0 to 2); the range 9 lies past the last one and prunes nothing"
    assert [line for line in notes if past in line] == [
        f"note     share {share}, steps 0, 9: {past}" for share in ("0.25", "0.5")
    ]
    assert len([line for line in notes if "full weights stayed" in line]) == 1


@pytest.fixture(scope="module")
def server(comfy, comfyui_path, tmp_path_factory, make_gates):
    """A server with the small model, gates for it, and this pack."""
    base = tmp_path_factory.mktemp("compare") / "base"
    comfy_server.prepare_folder(base, REPOSITORY, base / "none.safetensors")
    small = Path(__file__).with_name("small_model_node.py")
    (base / "custom_nodes" / small.name).symlink_to(small)
    gates = make_gates(constants=20.0)  # to be seen in 8 bits
    comfy.core.save_gates(gates, base / "models" / "ldcp_gates" / "gates.safetensors")
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


def prompt(**widgets):
    sampling = {"seed": 3, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    sampling |= {"denoise": 1.0, "positive": ["model", 1], "negative": ["model", 1]}
    sampling |= {"latent_image": ["latent", 0], "model": ["model", 0]}
    texts = {"shares": "0.5", "schedules": ""}
    compared = {"gates": ["gates", 0], "vae": ["vae", 0], **sampling, **texts, **widgets}
    graph = {
        "model": ("LDCPTestSmallModel", {}),
        "vae": ("LDCPTestSmallVae", {}),
        "gates": ("LDCPLoadGates", {"gates_name": "gates.safetensors"}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "compare": (ID, compared),
        "single": ("SaveImage", {"images": ["compare", 1], "filename_prefix": "single"}),
        "sampler": ("KSampler", sampling),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "plain": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "plain"}),
    }
    return {k: {"class_type": name, "inputs": inputs} for k, (name, inputs) in graph.items()}


def test_in_the_server_it_shows_the_grid_and_its_figures(server):
    result = server.run(prompt(schedules="0-\n0-1"))
    shown = result.status["compare"].splitlines()
    assert re.fullmatch(r"full model, \d+\.\d s", shown[0])
    figures = (
        r"50\.0% of channels pruned, \d+\.\d s, \d+\.\d\d of full, weights: .*, RMSE .* of 255"
    )
    assert re.fullmatch(f"share 0.5, {figures}", shown[1])
    assert re.fullmatch(f"share 0.5 in steps 0-1, {figures}", shown[2])
    history = json.loads(server.get("/history"))
    (run,) = history.values()
    (preview,) = run["outputs"]["compare"]["images"]
    assert preview["type"] == "temp"
    (plain,), single = (run["outputs"][name]["images"] for name in ("plain", "single"))
    plain, *single = (pixels(server.get("/view", **image)) for image in (plain, *single))
    assert [bool((image == plain).all()) for image in single] == [True, False, False]


def test_in_the_server_a_mistake_is_refused_before_the_run(server):
    for widgets, message in (
        ({"shares": "20"}, "shares has '20'"),
        ({"schedules": "3-"}, "steps 3- lies past the last of 3 steps (0 to 2)"),
    ):
        with pytest.raises(comfy_server.Refused) as caught:
            server.run(prompt(**widgets))
        assert str(caught.value).count(message) == 1
