"""What people combine with pruning, as graphs of ComfyUI's own nodes.

`test_node_compatibility.py` runs every one of them, and the table in docs/compatibility.md has a
row for each (`compatibility.py`). Importable without ComfyUI; a feature gets a `Kit` that has one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import model_families
import torch

FULL, PART, NONE = "full", "low VRAM (part)", "no VRAM"
#: files of comfy_extras that the features need; the other nodes are in ComfyUI's nodes.py
EXTRAS = (
    "context_windows",
    "easycache",
    "freelunch",
    "hooks",
    "hypertile",
    "mask",
    "model_advanced",
    "model_downscale",
    "model_merging",
    "pag",
    "sag",
    "tomesd",
    "torch_compile",
)
LORA = "ldcp_test_lora.safetensors"
LATENT = (16, 24)  # small, for speed: the mid block sees 2x3
IMAGE = (128, 192)


@dataclass
class Graph:
    """What arrives at the sampler."""

    model: Any
    positive: Any
    negative: Any
    latent: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Feature:
    """``model`` loads, ``patch`` is a node on the model (tried before and after ours), ``finish``
    works on the rest of the graph."""

    name: str
    patch: Callable[[Kit, Any], Any] | None = None
    model: Callable[[Kit], Any] | None = None
    finish: Callable[[Kit, Graph], None] | None = None
    loading: tuple[str, ...] = (FULL,)
    #: the largest relative difference from full convolutions with masked output
    tolerance: float = 2e-6
    #: compared in the mid block's first map alone: the rest of the U-Net rounds away what differs
    coarse: bool = False
    #: the graph without it makes another image
    changes: bool = True
    #: 1: it adds evaluations of the U-Net, -1: it leaves some out
    evaluations: int = 0


class Kit:
    """A ComfyUI to build graphs in."""

    def __init__(self, comfy: Any, small_model: Any, conditioning: Any, folder: Path) -> None:
        self.comfy, self.small_model, self.conditioning = comfy, small_model, conditioning
        self.folder = folder
        extras = Path(comfy.nodes.__file__).parent / "comfy_extras"
        for name in EXTRAS:
            file = str(extras / f"nodes_{name}.py")
            assert asyncio.run(comfy.nodes.load_custom_node(file, module_parent="comfy_extras"))
        comfy.folder_paths.add_model_folder_path("loras", str(folder))
        save_lora(folder / LORA)

    @cached_property
    def other_model(self) -> Any:
        return self.small_model(seed=7)

    def node(self, name: str, **inputs: Any) -> Any:
        """The outputs of a node, the inputs that are not given at their defaults."""
        cls = self.comfy.nodes.NODE_CLASS_MAPPINGS[name]
        declared = cls.INPUT_TYPES()
        known = {**declared.get("required", {}), **declared.get("optional", {})}
        for key, (kind, *options) in known.items():
            if options and "default" in options[0]:
                inputs.setdefault(key, options[0]["default"])
            elif isinstance(kind, list) and kind:  # the first of a dropdown
                inputs.setdefault(key, kind[0])
        assert set(inputs) <= set(known), f"{name} has no {set(inputs) - set(known)}"
        found = getattr(cls(), cls.FUNCTION)(**inputs)
        return getattr(found, "args", found)

    def model_node(self, name: str, model: Any, **inputs: Any) -> Any:
        return self.node(name, model=model, **inputs)[0]

    def graph(self, model: Any) -> Graph:
        width = model.model.model_config.unet_config["context_dim"]
        latent = {"samples": torch.zeros(1, 4, *LATENT)}
        conditions = self.conditioning(5, width), self.conditioning(6, width)
        return Graph(model, *conditions, latent, {"steps": 2, "cfg": 4.0})

    def sample(self, graph: Graph) -> Any:
        sampler = "KSamplerAdvanced" if "start_at_step" in graph.settings else "KSampler"
        seed = {"noise_seed" if sampler == "KSamplerAdvanced" else "seed": 3}
        inputs = {"sampler_name": "euler", "scheduler": "normal", "latent_image": graph.latent}
        inputs |= {"positive": graph.positive, "negative": graph.negative, **seed}
        return self.model_node(sampler, graph.model, **inputs, **graph.settings)["samples"]


def save_lora(path: Path) -> None:
    """A LoRA of rank 4 in the usual format, on the gated convolutions and on attention."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(4), {}

    def add(name: str, out: int, inner: tuple[int, ...]) -> None:
        ones = (1,) * (len(inner) - 1)
        up = torch.randn(out, 4, *ones, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = 0.3 * up
        down = torch.randn(4, *inner, generator=generator)
        tensors[f"lora_unet_{name}.lora_down.weight"] = 0.03 * down

    for block in (0, 1):
        for conv in (1, 2):
            add(f"mid_block_resnets_{block}_conv{conv}", 128, (128, 3, 3))
    add("mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 128, (128,))
    save_file(tensors, path)


def settings(**values: Any) -> Callable[[Kit, Graph], None]:
    return lambda kit, graph: graph.settings.update(values)


def patch(name: str, **inputs: Any) -> Callable[[Kit, Any], Any]:
    return lambda kit, model: kit.model_node(name, model, **inputs)


def merged(kit: Kit, model: Any) -> Any:
    return kit.node("ModelMergeSimple", model1=model, model2=kit.other_model, ratio=0.85)[0]


def lora(kit: Kit, model: Any) -> Any:
    return kit.model_node("LoraLoaderModelOnly", model, lora_name=LORA, strength_model=1.0)


def hooked_lora(kit: Kit, graph: Graph) -> None:
    (hooks,) = kit.node("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    inputs = {"cond_NEW": graph.positive, "set_cond_area": "default", "hooks": hooks}
    (graph.positive,) = kit.node("ConditioningSetProperties", **inputs)


def control_net(kit: Kit, graph: Graph) -> None:
    import comfy.cldm.cldm
    import comfy.controlnet
    from full_checkpoint import UNET, randomise_

    known = {*UNET, "num_classes"} - {"out_channels", "transformer_depth_output"}
    config = {**UNET, **graph.model.model.model_config.unet_config}
    narrow = {name: value for name, value in config.items() if name in known}
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, **narrow).eval()
    randomise_(network, seed=8)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    image = torch.rand(1, *IMAGE, 3, generator=torch.Generator().manual_seed(2))
    inputs = {"control_net": control, "image": image, "strength": 0.8}
    inputs |= {"positive": graph.positive, "negative": graph.negative}
    graph.positive, graph.negative = kit.node("ControlNetApplyAdvanced", **inputs)


def painted_latent() -> torch.Tensor:
    return torch.randn(1, 4, *LATENT, generator=torch.Generator().manual_seed(12))


def img2img(kit: Kit, graph: Graph) -> None:
    graph.latent = {"samples": painted_latent()}
    graph.settings["denoise"] = 0.5


def noise_mask(kit: Kit, graph: Graph) -> None:
    mask = torch.zeros(1, *IMAGE)
    mask[:, 32:96, 32:] = 1
    latent = {"samples": painted_latent()}
    (graph.latent,) = kit.node("SetLatentNoiseMask", samples=latent, mask=mask)


class PoolingVAE:
    """Stands in for a VAE: the nodes need something that encodes."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) - 0.5


def inpainting_model(kit: Kit) -> Any:
    model = kit.small_model(in_channels=9)
    model.model.set_inpaint()
    return model


def inpaint(kit: Kit, graph: Graph) -> None:
    pixels = torch.rand(1, *IMAGE, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, *IMAGE)
    mask[:, 32:96, 32:] = 1
    inputs = {"positive": graph.positive, "negative": graph.negative, "vae": PoolingVAE()}
    found = kit.node("InpaintModelConditioning", **inputs, pixels=pixels, mask=mask)
    graph.positive, graph.negative, graph.latent = found


def regional(kit: Kit, graph: Graph) -> None:
    """Two conditions of which one covers a part: evaluations of two sizes."""
    area = {"width": 64, "height": 128, "x": 64, "y": 0, "strength": 1.0}
    other = kit.conditioning(8)
    (part,) = kit.node("ConditioningSetArea", conditioning=other, **area)
    (graph.positive,) = kit.node(
        "ConditioningCombine", conditioning_1=graph.positive, conditioning_2=part
    )


def batch(count: int, **settings: Any) -> Callable[[Kit, Graph], None]:
    def set_batch(kit: Kit, graph: Graph) -> None:
        graph.settings.update(settings)
        graph.latent = {"samples": torch.zeros(count, 4, *LATENT)}

    return set_batch


def sharpen(kit: Kit, model: Any) -> Any:
    """What Fooocus does with its sharpness, in the slot that packs of this kind use."""

    def evaluate(apply_model: Callable[..., torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
        found = apply_model(call["input"], call["timestep"], **call["c"])
        blurred = torch.nn.functional.avg_pool2d(found, 3, 1, 1, count_include_pad=False)
        return found + 0.5 * (found - blurred)

    model = model.clone()
    model.set_model_unet_function_wrapper(evaluate)
    return model


def tiled(kit: Kit, model: Any) -> Any:
    """What Tiled Diffusion does: one evaluation becomes several of another shape."""

    def evaluate(apply_model: Callable[..., torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
        halves = call["input"].chunk(2, dim=-1)
        return torch.cat([apply_model(x, call["timestep"], **call["c"]) for x in halves], -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(evaluate)
    return model


def family(name: str) -> Callable[[Kit], Any]:
    return lambda kit: model_families.make(kit.comfy.root, name)


def precision(weights: torch.dtype, cast: torch.dtype | None) -> Callable[[Kit], Any]:
    return lambda kit: kit.small_model(dtype=weights, manual_cast=cast)


def channels_last(kit: Kit) -> Any:
    """As ``--force-channels-last`` leaves the model."""
    model = kit.small_model()
    model.model.diffusion_model.to(memory_format=torch.channels_last)
    return model


def context_windows(kit: Kit, model: Any) -> Any:
    windows = {"context_length": 2, "context_overlap": 1, "context_schedule": "standard_static"}
    return kit.model_node("ContextWindowsManual", model, **windows, fuse_method="pyramid")


FLOAT8 = torch.float8_e4m3fn
EVERY = (FULL, PART, NONE)
FREEU = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
DOWNSCALE = {"block_number": 3, "downscale_factor": 1.5, "start_percent": 0.0, "end_percent": 0.9}
DOWNSCALE |= {"downscale_method": "bicubic", "upscale_method": "bicubic"}

FEATURES = (
    Feature("Nothing else", loading=EVERY, changes=False),
    Feature("LoRA", lora, loading=EVERY),
    Feature("LoRA through conditioning hooks", finish=hooked_lora, evaluations=1),
    Feature("ControlNet", finish=control_net),
    Feature("FreeU", patch("FreeU", **FREEU)),
    Feature("FreeU V2", patch("FreeU_V2", **FREEU)),
    Feature("HyperTile", patch("HyperTile", tile_size=32, swap_size=2, max_depth=1)),
    Feature("Token merging (ToMe)", patch("TomePatchModel", ratio=0.5)),
    Feature("Perturbed-attention guidance", patch("PerturbedAttentionGuidance"), evaluations=1),
    Feature("Self-attention guidance", patch("SelfAttentionGuidance"), evaluations=1),
    Feature("RescaleCFG", patch("RescaleCFG", multiplier=0.7)),
    Feature("Deep Shrink", patch("PatchModelAddDownscale", **DOWNSCALE)),
    Feature(
        "EasyCache",
        patch("EasyCache", reuse_threshold=0.5, start_percent=0.0, end_percent=1.0),
        finish=settings(steps=8),
        evaluations=-1,
    ),
    Feature("Model merging", merged, loading=(FULL, PART)),
    Feature("UNet function wrapper (sharpness)", sharpen),
    Feature("UNet function wrapper (tiles)", tiled, evaluations=1),
    # 0.3.64 itself fails unless the batch is as long as its list of sigmas
    Feature(
        "Context windows",
        context_windows,
        finish=batch(3, steps=2),
        evaluations=1,
        changes=False,  # to SD1.5 the images of a batch are independent
    ),
    Feature("fp8 weights (e4m3fn)", model=precision(FLOAT8, torch.float32), loading=EVERY),
    Feature("LoRA on fp8 weights", lora, model=precision(FLOAT8, torch.float32), loading=EVERY),
    Feature("bf16 weights, float32 arithmetic", model=precision(torch.bfloat16, torch.float32)),
    Feature(
        "bf16 weights and arithmetic",
        model=precision(torch.bfloat16, None),
        loading=EVERY,
        tolerance=6e-3,
        coarse=True,
        changes=False,
    ),
    Feature("channels_last", model=channels_last, changes=False),
    Feature("Inpainting model", model=inpainting_model, finish=inpaint),
    Feature("Noise mask", finish=noise_mask),
    Feature("Image to image", finish=img2img),
    Feature(
        "KSampler (Advanced), steps 1 to 4 of 5",
        finish=settings(steps=5, start_at_step=1, end_at_step=4),
        evaluations=1,
    ),
    Feature("CFG 1", finish=settings(cfg=1.0)),
    Feature("Regional conditioning", finish=regional, evaluations=1),
    Feature("Batch of 3", finish=batch(3)),
    Feature("SD2", model=family("SD2"), loading=EVERY),
    Feature("SDXL", model=family("SDXL"), loading=EVERY),
    Feature("LoRA on SDXL", lora, model=family("SDXL"), loading=EVERY),
    Feature("ControlNet on SDXL", model=family("SDXL"), finish=control_net),
)


@dataclass(frozen=True)
class Other:
    """A combination with an outcome of another kind, and the test that shows it."""

    name: str
    result: str
    test: str


OTHERS = (
    Other(
        "torch.compile",
        "`eager`: within 2e-06; `inductor`: within 3.2e-06, where compiling alone changes 2.9e-06",
        "test_a_compiled_model_is_pruned_as_an_uncompiled_one",
    ),
    Other(
        "EasyCache on a compiled model",
        "`eager`: within 2e-06 of the masked one; the evaluations that are left are pruned",
        "test_a_compiled_model_whose_evaluations_easycache_leaves_out_is_pruned_in_the_others",
    ),
    Other(
        "Spectrum's nodes (ComfyUI-Spectrum-sdxl, ComfyUI-Spectrum-SDXL-Proper)",
        "within 1e-05 of the masked one; the evaluations that are left are pruned",
        "test_what_spectrum_forecasts_from_pruned_steps_is_what_it_forecasts_from_masked_ones",
    ),
    Other(
        "Attention that another node replaces (IPAdapter, PAG, SAG), where heads are pruned",
        "that attention runs unpruned, and the node says so",
        "test_attention_that_another_node_replaces_runs_as_it_is_and_the_run_says_so",
    ),
    Other(
        "Model merging, a pruned model as *model2*",
        "not carried over: merging takes weights alone; put the node behind the merge",
        "test_merging_takes_no_pruning_from_the_second_model",
    ),
    Other(
        "Packs that replace or hook a layer inside a pruned block",
        "that block runs unpruned, and the node says so",
        "test_a_block_with_other_changes_runs_as_it_is_and_the_run_says_so",
    ),
    Other(
        "Quantised checkpoints (fp8 with scales, int8), gates with `ff` or `heads`",
        "the ResBlocks are pruned; those layers run unpruned, and the node says so",
        "test_quantised_layers_run_unpruned_and_the_res_blocks_beside_them_pruned",
    ),
    Other(
        "Packs that change a norm, an activation or the border "
        "(AnimateDiff-Evolved with v1 motion models, seamless tiling)",
        "within 1e-06; those blocks lose a part of the savings, and the node says so",
        "test_a_changed_norm_or_border_costs_savings_alone_and_the_run_says_so",
    ),
    Other(
        "DeepCache's node",
        "prunes nothing, since it computes in the model's place, and the node says so",
        "test_a_run_in_which_the_model_is_never_asked_says_so",
    ),
    Other(
        "SVD, SD3, Flux and other families",
        "not supported, refused with a message: their layers are others",
        "test_another_family_is_refused",
    ),
)
