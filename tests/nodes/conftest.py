"""A small SD1.5 inside a real ComfyUI, and the masked reference to compare with.

ComfyUI's checkpoint loaders recognise only the true SD1.5 shapes, so most tests build a narrow
U-Net of the same topology from ComfyUI's own classes. The reference does not use the code under
test: forward hooks on the dense model replace the pruned channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import full_checkpoint
import pretend_device
import pytest
import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
SITES = tuple(f"mid_block.resnets.{r}.{c}" for r in (0, 1) for c in ("conv1", "conv2"))


@pytest.fixture(scope="session")
def comfy(comfyui_path, report_note):
    """ComfyUI's modules, on the CPU, with the pack loaded by ComfyUI's own loader."""
    sys.path.insert(0, str(comfyui_path))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.hooks
        import comfy.model_base
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models
        import folder_paths

        import nodes
    except ImportError as error:  # this Python lacks one of ComfyUI's requirements
        sys.path.remove(str(comfyui_path))
        message = f"NODE TESTS SKIPPED: {comfyui_path} does not import here: {error}"
        report_note.append(message)
        pytest.skip(message)
    assert asyncio.run(nodes.load_custom_node(str(REPOSITORY)))
    pack = str(REPOSITORY).replace(".", "_x_")  # the name that ComfyUI gives it
    parts = ["shared", "files", "queued", "load_node", "schedule_node", "apply_node"]
    host = ("model", "blocks", "patch", "run", "identity", "weights", "dynamic_vram")
    parts += [f"host.{name}" for name in host]
    return SimpleNamespace(
        root=comfy,
        nodes=nodes,
        folder_paths=folder_paths,
        core=sys.modules[f"{pack}.ldcp_core"],
        **{
            name.removeprefix("host."): importlib.import_module(f"{pack}.nodes.{name}")
            for name in parts
        },
    )


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI samples. One thread: on small models more of them cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_model(comfy):
    """Make a ModelPatcher of an SD1.5 U-Net with widths 32, 64, 128, 128 and random weights."""

    def make(seed=0, dtype=torch.float32, manual_cast=None, **changes):
        narrow = {**full_checkpoint.UNET, "model_channels": 32, "context_dim": 64}
        model_config = comfy.root.supported_models.SD15({**narrow, **changes})
        model_config.set_inference_dtype(dtype, manual_cast)
        model = comfy.root.model_base.BaseModel(model_config, device=torch.device("cpu")).eval()
        full_checkpoint.randomise_(model.diffusion_model, seed)
        cpu = torch.device("cpu")
        return comfy.root.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return make


@pytest.fixture(scope="session")
def model(small_model):
    """One small model for every test that leaves it as it was."""
    return small_model()


@pytest.fixture(scope="session")
def sd15_checkpoint(comfy, comfyui_path):
    """A complete SD1.5 checkpoint at full size, for what the narrow model cannot stand in for."""
    return full_checkpoint.find_or_make(comfyui_path)


@pytest.fixture(scope="session")
def needs_browser(report_note):
    """Neither playwright nor a browser is a requirement of ComfyUI or of this repository."""
    import browser  # which needs what only ComfyUI's Python has

    reason = browser.missing()
    if reason:
        message = f"BROWSER TESTS SKIPPED: {reason}"
        report_note.append(message)
        pytest.skip(message)


@pytest.fixture
def keep(tmp_path):
    """Keep a screenshot of what is in sight."""
    folder = Path(os.environ.get("LDCP_TEST_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.page.screenshot(path=str(folder / f"{name}.png"))


@pytest.fixture(scope="session")
def make_gates(comfy):
    """Random gates: about half of the channels of the named sites pruned to random constants.

    With corrections of the layers that read them.
    """

    def make(sites=SITES, padding="zero", seed=1, constants=1.0, topology=None, info=(), power=1):
        topology = topology or comfy.core.Topology(
            (32, 64, 128, 128), context_width=64, heads=(8, 8, 8, 8)
        )
        known = {site.name: site for site in topology.all_sites()}
        generator = torch.Generator().manual_seed(seed)

        def score(site):  # of a head one
            drawn = torch.rand(site.channels // site.group, generator=generator) ** power
            return drawn.repeat_interleave(site.group)

        scores = {s: score(known[s]) for s in sites}
        mu = {s: constants * torch.randn(known[s].channels, generator=generator) for s in sites}
        corrections = {}
        for name in sites:
            site, kept = known[name], int((scores[name] > 0.5).sum())
            if site.reader is not None:
                right = torch.randn(2, kept * site.kind.reader_taps, generator=generator)
                parts = torch.randn(site.block.outputs(), 3, generator=generator) / 4
                corrections[name] = comfy.core.Correction(
                    parts[:, :2].half(), (right / right.shape[1] ** 0.5).half(), parts[:, 2]
                )
        return comfy.core.Gates(scores, mu, padding, topology, dict(info), corrections=corrections)

    return make


@pytest.fixture(scope="session")
def masked(comfy):
    """Context manager: the model computes everything, then pruned channels become constants."""

    @contextlib.contextmanager
    def run(model, gates, keep_sets=None, when=lambda: True):
        unet = model.model.diffusion_model
        layers = comfy.model.model_topology(model.model).layers_per_block
        handles = []

        def add(conv, hook, **options):
            def timed(*call):
                return hook(*call) if when() else None

            handles.append(conv.register_forward_hook(timed, **options))

        def add_before(linear, hook):
            def timed(layer, inputs):
                return hook(layer, (), *inputs) if when() else None

            handles.append(linear.register_forward_pre_hook(timed))

        for site, keep in (keep_sets or gates.keep_sets()).items():
            layer = unet.get_submodule(comfy.model.layer_path(site, layers).removesuffix(".proj"))
            if site.endswith("to_v"):  # of whole heads what is read
                reader = unet.get_submodule(reader_path(comfy, site, layers))
                add_before(reader, replacer(keep, gates.constant(site)))
            else:
                add(layer, replacer(keep, gates.constant(site)))
            correction = gates.corrections.get(site)
            as_learned = torch.equal(keep, gates.keep_sets()[site]) and not keep.all()
            if correction is not None and as_learned:
                reader = unet.get_submodule(reader_path(comfy, site, layers))
                # before a residual gate replaces its rows
                add(reader, corrected(keep, correction), prepend=True)
            if site.endswith("conv1") and gates.padding == "extend":
                conv2 = unet.get_submodule(comfy.model.layer_path(site[:-1] + "2", layers))
                # before a residual gate replaces its rows
                add(conv2, extended(keep), prepend=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return run


def replacer(keep, constant):
    def hook(layer, inputs, output):
        shape = (-1, 1, 1) if output.dim() == 4 else (-1,)  # a transformer's channels come last
        mask, values = keep.to(output.device), constant.to(output)
        return torch.where(mask.view(shape), output, values.view(shape))

    return hook


def reader_path(comfy, site, layers):
    """The host's path of the layer that reads a site's channels."""
    if site.endswith("net.0"):
        return comfy.model.layer_path(site, layers).removesuffix("0.proj") + "2"
    if site.endswith("to_v"):
        return comfy.model.layer_path(site, layers).removesuffix("to_v") + "to_out.0"
    return comfy.model.layer_path(site[:-1] + "2", layers)


def corrected(keep, correction):
    """The reader with a second, small layer of kept channels beside it."""

    def hook(layer, inputs, output):
        x = inputs[0].float()
        left, right = correction.left.to(x), correction.right.to(x)
        if output.dim() == 4:
            weight = (left @ right).view(len(left), -1, 3, 3)
            more = layer._conv_forward(x[:, keep], weight, correction.bias.to(x))
        else:
            more = F.linear(F.linear(x[..., keep], right), left, correction.bias.to(x))
        return output + more.to(output)

    return hook


def extended(keep):
    """conv2 as if the pruned channels went on past the border, by its own forward alone."""

    def hook(conv, inputs, output):
        a, mask = inputs[0], keep[:, None, None].to(inputs[0])

        def run(x):
            return type(conv).forward(conv, x)

        planes = run(F.pad(a * (1 - mask), (1, 1, 1, 1), mode="replicate"))[..., 1:-1, 1:-1]
        return run(a * mask) + planes - run(torch.zeros_like(a))

    return hook


@pytest.fixture(scope="session")
def conditioning():
    def make(seed=5, width=64):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, 77, width, generator=generator)
        return [[text, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]

    return make


@pytest.fixture(scope="session")
def sample(comfy, conditioning):
    """Sample a latent; ``evaluated`` gets (x, t, conditions, output, steps reported) per call."""

    def run(model, steps=3, size=(32, 32), sampler="euler", cfg=1.0, evaluated=None, **options):
        model, width = model.clone(), model.model.model_config.unet_config["context_dim"]
        done = []

        def record(apply_model, call):
            output = apply_model(call["input"], call["timestep"], **call["c"])
            evaluated.append((call["input"], call["timestep"], call["c"], output, len(done)))
            return output

        if evaluated is not None:
            model.set_model_unet_function_wrapper(record)
        generator = torch.Generator().manual_seed(9)
        return comfy.root.sample.sample(
            model,
            torch.randn(1, 4, *size, generator=generator),
            steps,
            cfg,
            sampler,
            options.pop("scheduler", "normal"),
            options.pop("positive", conditioning(5, width)),
            conditioning(6, width),
            torch.zeros(1, 4, *size),
            callback=lambda *_: done.append(1),
            disable_pbar=True,
            seed=3,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def unpatched():
    """The same evaluation of the same model without any wrapper."""

    def call(model, x, t, conditions):
        options = {**conditions["transformer_options"], "wrappers": {}}
        return model.model.apply_model(x, t, **{**conditions, "transformer_options": options})

    return call


@pytest.fixture(scope="session")
def memory(comfy, report_note):
    """Counters of the pretend device, with ComfyUI told that there is always room on it."""
    try:
        counters = pretend_device.build()
    except (OSError, RuntimeError, ImportError) as error:  # no C++ compiler or no ninja here
        message = f"MEMORY TESTS SKIPPED: the pretend device does not build: {error}"
        report_note.append(message)
        pytest.skip(message)
    management = comfy.root.model_management
    free = management.get_free_memory

    def always_room(device=None, torch_free_too=False):
        if device is None or device.type != pretend_device.NAME:
            return free(device, torch_free_too)
        return (2**34, 2**34) if torch_free_too else 2**34

    management.get_free_memory = always_room
    yield counters
    management.get_free_memory = free


@pytest.fixture
def device(memory):
    return torch.device(pretend_device.NAME, 0)


@pytest.fixture
def layer(comfy, make_gates):
    def make(steps=None, full_weights="auto", padding="zero", seed=1):
        gates = make_gates(padding=padding, seed=seed)
        schedule = comfy.core.ALWAYS if steps is None else comfy.core.Schedule.steps(steps)
        return comfy.patch.Layer(gates, gates.keep_sets(), schedule, full_weights)

    return make


@pytest.fixture
def sampling(conditioning):
    """The arguments of KSampler and of the nodes that sample as it does."""

    def make(steps=2, cfg=3.0, batch=1, **changes):
        return {
            "seed": 3,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": "euler",
            "scheduler": "normal",
            "positive": conditioning(5),
            "negative": conditioning(6),
            "latent_image": {"samples": torch.zeros(batch, 4, 16, 16)},
            "denoise": 1.0,
            **changes,
        }

    return make


@pytest.fixture
def run(comfy, conditioning):
    """Sample three steps with a callback per step."""

    def sample(model, callback=lambda *_: None, steps=3, side=32, positive=None):
        generator = torch.Generator().manual_seed(9)
        return comfy.root.sample.sample(
            model.clone(),
            torch.randn(1, 4, side, side, generator=generator),
            steps,
            1.0,
            "euler",
            "normal",
            positive or conditioning(5),
            conditioning(6),
            torch.zeros(1, 4, side, side),
            callback=callback,
            disable_pbar=True,
            seed=3,
        )

    return sample


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture
def check_exact(comfy, sample, unpatched, masked):
    """Prune step 1 of 3; every evaluation is the dense one, or the masked reference."""

    def run(model, gates, tolerance=2e-6):
        layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.steps("1"))
        evaluated = []
        sample(comfy.patch.attach(model, layer), 3, (32, 40), evaluated=evaluated)
        assert [step for *_, step in evaluated] == [0, 1, 2]
        for *call, output, step in evaluated:
            whole = unpatched(model, *call)
            if step != 1:
                assert torch.equal(output, whole)
                continue
            with masked(model, gates):
                reference = unpatched(model, *call)
            assert rms(output - reference) <= tolerance * rms(reference)
            assert rms(whole - reference) >= 100 * tolerance * rms(reference)

    return run
