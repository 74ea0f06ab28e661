"""Loading a single file in the original layout, a diffusers folder or a hub id, offline.

The original layout is written out here by hand, so that the name mapping is checked against
something other than itself. Full-size weights are loaded once; everything else uses tiny ones.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldcp_core.diffusers import topology_of
from training.errors import UserError
from training.model import configs
from training.model import load as models
from training.model.configs import CONFIGS, config_of, single_file
from training.model.encode import embed_prompts, encode_images
from training.model.load import load_model

Shapes = dict[str, tuple[int, ...]]
WIDTHS = (320, 640, 1280, 1280)
VAE_WIDTHS = (128, 256, 512, 512)
TEXT_ENCODER = "cond_stage_model.transformer."
TEXT_ENCODER_2 = "cond_stage_model.model."
TEXT_ENCODERS_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(autouse=True)
def no_large_leftovers(tmp_path: Path) -> Iterator[None]:
    yield  # not every file system keeps holes small
    shutil.rmtree(tmp_path, ignore_errors=True)


# --- the original layout, by hand -----------------------------------------------------------------


def _norm(name: str, c: int) -> Shapes:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def _conv(name: str, cin: int, cout: int, k: int = 3) -> Shapes:
    return {f"{name}.weight": (cout, cin, k, k), f"{name}.bias": (cout,)}


def _linear(name: str, cin: int, cout: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (cout, cin)} | ({f"{name}.bias": (cout,)} if bias else {})


def _unet_res(name: str, cin: int, cout: int, emb: int) -> Shapes:
    shapes = _norm(f"{name}.in_layers.0", cin) | _conv(f"{name}.in_layers.2", cin, cout)
    shapes |= _linear(f"{name}.emb_layers.1", emb, cout)
    shapes |= _norm(f"{name}.out_layers.0", cout) | _conv(f"{name}.out_layers.3", cout, cout)
    return shapes | (_conv(f"{name}.skip_connection", cin, cout, 1) if cin != cout else {})


def _unet_attention(name: str, c: int, context: int, depth: int, linear: bool) -> Shapes:
    shapes = _norm(f"{name}.norm", c)
    for projection in (f"{name}.proj_in", f"{name}.proj_out"):
        shapes |= _linear(projection, c, c) if linear else _conv(projection, c, c, 1)
    for i in range(depth):
        shapes |= _unet_transformer(f"{name}.transformer_blocks.{i}", c, context)
    return shapes


def _unet_transformer(block: str, c: int, context: int) -> Shapes:
    shapes: Shapes = {}
    for attention, width in (("attn1", c), ("attn2", context)):
        shapes |= _linear(f"{block}.{attention}.to_q", c, c, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_k", width, c, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_v", width, c, bias=False)
        shapes |= _linear(f"{block}.{attention}.to_out.0", c, c)
    shapes |= _linear(f"{block}.ff.net.0.proj", c, 8 * c) | _linear(f"{block}.ff.net.2", 4 * c, c)
    for i in (1, 2, 3):
        shapes |= _norm(f"{block}.norm{i}", c)
    return shapes


def _unet(
    widths: tuple[int, ...],
    context: int,
    depths: tuple[int, ...] = (1, 1, 1, 0),
    mid_depth: int = 1,
    pooled: int = 0,
    linear: bool = False,
) -> Shapes:
    """``depths``: transformers behind each ResBlock of a level; ``pooled``: 2816 in SDXL."""
    emb, deepest = 4 * widths[0], len(widths) - 1
    shapes = _linear("time_embed.0", widths[0], emb) | _linear("time_embed.2", emb, emb)
    if pooled:
        shapes |= _linear("label_emb.0.0", pooled, emb) | _linear("label_emb.0.2", emb, emb)
    shapes |= _conv("input_blocks.0.0", 4, widths[0])
    skips, c, n = [widths[0]], widths[0], 0
    for level, width in enumerate(widths):
        for _ in range(2):
            n += 1
            shapes |= _unet_res(f"input_blocks.{n}.0", c, width, emb)
            if depths[level]:
                name = f"input_blocks.{n}.1"
                shapes |= _unet_attention(name, width, context, depths[level], linear)
            c = width
            skips.append(c)
        if level < deepest:
            n += 1
            shapes |= _conv(f"input_blocks.{n}.0.op", c, c)
            skips.append(c)
    shapes |= _unet_res("middle_block.0", c, c, emb) | _unet_res("middle_block.2", c, c, emb)
    shapes |= _unet_attention("middle_block.1", c, context, mid_depth, linear)
    for n in range(3 * len(widths)):
        level, j = deepest - n // 3, n % 3
        shapes |= _unet_res(f"output_blocks.{n}.0", c + skips.pop(), widths[level], emb)
        c = widths[level]
        if depths[level]:
            name = f"output_blocks.{n}.1"
            shapes |= _unet_attention(name, c, context, depths[level], linear)
        if j == 2 and level > 0:
            shapes |= _conv(f"output_blocks.{n}.{2 if depths[level] else 1}.conv", c, c)
    return shapes | _norm("out.0", c) | _conv("out.2", c, 4)


def _vae_res(name: str, cin: int, cout: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", cin) | _conv(f"{name}.conv1", cin, cout)
    shapes |= _norm(f"{name}.norm2", cout) | _conv(f"{name}.conv2", cout, cout)
    return shapes | (_conv(f"{name}.nin_shortcut", cin, cout, 1) if cin != cout else {})


def _vae_mid(name: str, c: int) -> Shapes:
    shapes = _vae_res(f"{name}.block_1", c, c) | _vae_res(f"{name}.block_2", c, c)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{layer}", c, c, 1)
    return shapes | _norm(f"{name}.attn_1.norm", c)


def _vae(widths: tuple[int, ...]) -> Shapes:
    shapes, c = _conv("encoder.conv_in", 3, widths[0]), widths[0]
    for i, width in enumerate(widths):
        for j in range(2):
            shapes |= _vae_res(f"encoder.down.{i}.block.{j}", c, width)
            c = width
        if i < len(widths) - 1:
            shapes |= _conv(f"encoder.down.{i}.downsample.conv", c, c)
    shapes |= _vae_mid("encoder.mid", c) | _norm("encoder.norm_out", c)
    shapes |= _conv("encoder.conv_out", c, 8) | _conv("quant_conv", 8, 8, 1)
    shapes |= _conv("post_quant_conv", 4, 4, 1) | _conv("decoder.conv_in", 4, c)
    shapes |= _vae_mid("decoder.mid", c)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(3):
            shapes |= _vae_res(f"decoder.up.{i}.block.{j}", c, width)
            c = width
        if i > 0:
            shapes |= _conv(f"decoder.up.{i}.upsample.conv", c, c)
    return shapes | _norm("decoder.norm_out", c) | _conv("decoder.conv_out", c, 3)


def _clip(layers: int, c: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {
        "embeddings.position_ids": (1, 77),
        "embeddings.token_embedding.weight": (vocabulary, c),
        "embeddings.position_embedding.weight": (77, c),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", c, c)
        shapes |= _norm(f"{layer}.layer_norm1", c) | _norm(f"{layer}.layer_norm2", c)
        shapes |= _linear(f"{layer}.mlp.fc1", c, 4 * c) | _linear(f"{layer}.mlp.fc2", 4 * c, c)
    return {f"text_model.{k}": v for k, v in (shapes | _norm("final_layer_norm", c)).items()}


def original_layout(
    widths: tuple[int, ...] = WIDTHS,
    vae_widths: tuple[int, ...] = VAE_WIDTHS,
    text: tuple[int, int, int] = (12, 768, 49408),
) -> Shapes:
    parts = (
        (single_file.UNET, _unet(widths, text[1])),
        (single_file.VAE, _vae(vae_widths)),
        (TEXT_ENCODER, _clip(*text)),
    )
    return {prefix + key: shape for prefix, shapes in parts for key, shape in shapes.items()}


def _open_clip(layers: int, c: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {
        "positional_embedding": (77, c),
        "text_projection": (c, c),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, c),
    }
    for i in range(layers):
        layer = f"transformer.resblocks.{i}"
        shapes |= {f"{layer}.attn.in_proj_weight": (3 * c, c)}
        shapes |= {f"{layer}.attn.in_proj_bias": (3 * c,)}
        shapes |= _linear(f"{layer}.attn.out_proj", c, c)
        shapes |= _norm(f"{layer}.ln_1", c) | _norm(f"{layer}.ln_2", c)
        shapes |= _linear(f"{layer}.mlp.c_fc", c, 4 * c) | _linear(f"{layer}.mlp.c_proj", 4 * c, c)
    return shapes | _norm("ln_final", c)


def sdxl_layout(
    widths: tuple[int, ...] = (320, 640, 1280),
    depths: tuple[int, ...] = (0, 2, 10),
    vae_widths: tuple[int, ...] = VAE_WIDTHS,
    layers: tuple[int, int] = (12, 32),
    vocabulary: int = 49408,
) -> Shapes:
    first, second = TEXT_ENCODERS_XL
    parts = (
        (single_file.UNET, _unet(widths, 2048, depths, depths[-1], 2816, linear=True)),
        (single_file.VAE, _vae(vae_widths)),
        (first, _clip(layers[0], 768, vocabulary)),
        (second, _open_clip(layers[1], 1280, vocabulary)),
    )
    return {prefix + key: shape for prefix, shapes in parts for key, shape in shapes.items()}


def sd2_layout(
    widths: tuple[int, ...] = WIDTHS,
    vae_widths: tuple[int, ...] = VAE_WIDTHS,
    layers: int = 24,
    vocabulary: int = 49408,
) -> Shapes:
    parts = (
        (single_file.UNET, _unet(widths, 1024, linear=True)),
        (single_file.VAE, _vae(vae_widths)),
        (TEXT_ENCODER_2, _open_clip(layers, 1024, vocabulary)),
    )
    return {prefix + key: shape for prefix, shapes in parts for key, shape in shapes.items()}


FULL, FULL_2, FULL_XL = original_layout(), sd2_layout(), sdxl_layout()


def random_weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Half-precision noise, different for every key."""
    state = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        state[key] = torch.randn(shape, generator=generator).mul_(0.02).half()
        if key.endswith("position_ids"):
            state[key] = torch.arange(77).view(1, 77)
    return state


def write_sparse(
    path: Path,
    shapes: Shapes,
    filled: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A safetensors file of the true size in which only `filled` is written; the rest is a hole."""
    entries: dict[str, object] = {"__metadata__": metadata or {}}
    end, starts = 0, {}
    for key, shape in shapes.items():
        starts[key], end = end, end + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [starts[key], end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for key, tensor in (filled or {}).items():
            file.seek(8 + len(header) + starts[key])
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(header) + end)
    return path


# Pairs (part, diffusers name, original name), from the design's key map and the two layouts.
PAIRS = [
    ("unet", "conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
    (
        "unet",
        "mid_block.resnets.0.conv1.weight",
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
    ),
    (
        "unet",
        "mid_block.resnets.1.conv2.bias",
        "model.diffusion_model.middle_block.2.out_layers.3.bias",
    ),
    (
        "unet",
        "down_blocks.2.resnets.1.conv1.weight",
        "model.diffusion_model.input_blocks.8.0.in_layers.2.weight",
    ),
    (
        "unet",
        "down_blocks.0.downsamplers.0.conv.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
    ),
    (
        "unet",
        "up_blocks.1.resnets.2.conv2.weight",
        "model.diffusion_model.output_blocks.5.0.out_layers.3.weight",
    ),
    (
        "unet",
        "up_blocks.0.upsamplers.0.conv.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
    ),
    (
        "unet",
        "up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.10.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    ("vae", "encoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight"),
    (
        "vae",
        "decoder.up_blocks.0.resnets.2.conv1.weight",
        "first_stage_model.decoder.up.3.block.2.conv1.weight",
    ),
    ("vae", "quant_conv.bias", "first_stage_model.quant_conv.bias"),
]


VAE_QUERY = "first_stage_model.decoder.mid.attn_1.q.weight"
TEXT_PREFIX = TEXT_ENCODER + "text_model."
TEXT = [
    TEXT_PREFIX + "embeddings.token_embedding.weight",
    TEXT_PREFIX + "encoder.layers.0.mlp.fc2.weight",
    TEXT_PREFIX + "final_layer_norm.weight",
]
CHECKED = {theirs for _, _, theirs in PAIRS} | {VAE_QUERY, *TEXT}


def assert_weights_landed(model: models.DiffusionModel, state: dict[str, torch.Tensor]) -> None:
    for part, ours, theirs in PAIRS:
        loaded = getattr(model, part).state_dict()[ours]
        assert torch.equal(loaded, state[theirs].to(loaded.dtype)), ours
    # The VAE's attention is a 1x1 conv in the original and a linear layer in diffusers.
    query = model.vae.state_dict()["decoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(query, state[VAE_QUERY][:, :, 0, 0].to(query.dtype))
    text = {k.removeprefix("text_model."): v for k, v in model.text_encoder.state_dict().items()}
    for theirs in TEXT:
        loaded = text[theirs.removeprefix(TEXT_PREFIX)]
        assert torch.equal(loaded, state[theirs].to(loaded.dtype)), theirs


def assert_frozen(model: models.DiffusionModel) -> None:
    for module in (model.unet, model.vae, *model.text_encoders):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


# --- a full-size single file ----------------------------------------------------------------------


def test_a_full_size_single_file_loads_offline_into_the_right_modules(tmp_path: Path) -> None:
    shapes = original_layout()
    # 1131 is the tensor count of the widely used pruned SD1.5 files: 686 + 248 + 197.
    assert len(shapes) == 1131
    state = random_weights({key: shapes[key] for key in shapes if key in CHECKED})
    path = write_sparse(tmp_path / "v1-5-pruned-emaonly.safetensors", shapes, state)

    model = load_model(str(path), dtype=torch.bfloat16)

    assert_frozen(model)
    assert_weights_landed(model, state)
    assert (model.resolution, model.vae_scale_factor) == (512, 8)
    assert model.alphas_cumprod.shape == (1000,)
    # beta_0 = 0.00085, so the first cumulative product is 1 - 0.00085.
    assert model.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    text, pooled = embed_prompts(model, ["a photo of a cat", ""])
    assert text.shape == (2, 77, 768) and pooled.shape == (2, 0)
    assert not torch.equal(text[0], text[1])
    with torch.no_grad():
        noise = model.unet(torch.randn(1, 4, 8, 8).bfloat16(), 500, text[:1].bfloat16()).sample
    assert noise.shape == (1, 4, 8, 8)
    assert noise.isfinite().all()


def test_the_shipped_tokenizer_is_clips() -> None:
    tokenizer = models._clip_tokenizer()
    assert tokenizer.model_max_length == 77
    assert len(tokenizer.get_vocab()) == 49408
    # Known token ids of CLIP's vocabulary: "a" 320, "photo" 1125, "of" 539, "cat" 2368.
    ids = tokenizer("A photo of a cat", padding="max_length", max_length=77).input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[-1] == 49407  # padded with the end token


# --- tiny single files: every variant -------------------------------------------------------------


TINY = ((32, 32, 64, 64), (32, 32, 32, 32), (1, 768, 512))
TINY_2 = ((32, 32, 64, 64), (32, 32, 32, 32), 1, 512)
TINY_XL = ((32, 32, 64), (0, 1, 2), (32, 32, 32, 32), (1, 1), 512)


@pytest.fixture(scope="module")
def tiny_state() -> dict[str, torch.Tensor]:
    return random_weights(original_layout(*TINY))


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped configs with small widths, so that a checkpoint of the layout stays small."""
    root = tmp_path / "configs"
    shutil.copytree(CONFIGS, root)
    short = {"num_hidden_layers": 1, "vocab_size": 512}
    changes = {
        "sd15/unet": {"block_out_channels": TINY[0]},
        "sd15/vae": {"block_out_channels": TINY[1]},
        "sd15/text_encoder": short,
        "sd2/unet": {"block_out_channels": TINY_2[0], "attention_head_dim": 8},
        "sd2/text_encoder": short,
        "sdxl/unet": {
            "block_out_channels": TINY_XL[0],
            "transformer_layers_per_block": [1, *TINY_XL[1][1:]],
            "attention_head_dim": 8,
        },
        "sdxl/vae": {"block_out_channels": TINY_XL[2]},
        "sdxl/text_encoder_2": short,
    }
    for part, change in changes.items():
        edit_json(root / part / "config.json", **change)
    monkeypatch.setattr(configs, "CONFIGS", root)


def edit_json(path: Path, **change: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _with_ema(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    flat = {k.replace(".", ""): v for k, v in state.items() if k.startswith(single_file.UNET)}
    ema = {"model_ema." + k.removeprefix("model"): torch.ones_like(v) for k, v in flat.items()}
    return state | ema | {"betas": torch.ones(1000), "model_ema.num_updates": torch.tensor(7)}


def _without_position_ids(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("position_ids")}


def _old_text_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("transformer.text_model.", "transformer."): v for k, v in state.items()}


def _float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.float() for k, v in state.items()}


def _extra_heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    extra = {"cond_stage_model.logit_scale": torch.tensor(4.6)}
    extra["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(768, 768)
    return state | extra


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize(
    ("suffix", "variants"),
    [
        (".safetensors", [_with_ema, _without_position_ids]),
        (".safetensors", [_old_text_prefix, _float32]),
        (".safetensors", [_extra_heads]),
        (".ckpt", [_with_ema]),
    ],
)
def test_variants_of_a_single_file_load(
    variants: list[Any], suffix: str, tiny_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    state = tiny_state
    for variant in variants:
        state = variant(state)
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 840000}, path)
    else:
        save_file(state, path)
    model = load_model(str(path), dtype=torch.bfloat16)
    assert_frozen(model)
    assert_weights_landed(model, tiny_state)
    assert model.unet.dtype == torch.bfloat16
    assert model.vae.dtype == model.text_encoder.dtype == torch.float32
    assert model.scheduler.config.prediction_type == "epsilon"  # without the key for v


@pytest.mark.usefixtures("tiny_configs")
def test_reading_a_single_file_shows_how_far_it_is(
    tiny_state: dict[str, torch.Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO")
    save_file(tiny_state, tmp_path / "model.safetensors")
    load_model(str(tmp_path / "model.safetensors"))
    said = capsys.readouterr().err
    for prefix in (single_file.UNET, single_file.VAE, TEXT_ENCODER):
        count = sum(key.startswith(prefix) for key in tiny_state)
        assert f"reading {prefix.rstrip('.')}: {count}/{count}" in said


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("model.diffusion_model.middle_block.2.out_layers.3.weight", "unet"),
        ("first_stage_model.decoder.conv_out.bias", "vae"),
        ("first_stage_model.decoder.up.1.upsample.conv.bias", "vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias", "text encoder"),
    ],
)
def test_a_missing_tensor_is_named(
    key: str, part: str, tiny_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tiny_state.items() if k != key}, path)
    with pytest.raises(UserError, match=f"tensor.* of the {part} are missing"):
        load_model(str(path))


@pytest.mark.usefixtures("tiny_configs")
def test_a_tensor_of_another_shape_is_named(
    tiny_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    path = tmp_path / "model.safetensors"
    save_file(tiny_state | {key: torch.zeros(48, 64, 3, 3)}, path)
    with pytest.raises(
        UserError, match=r"mid_block\.resnets\.0\.conv1\.weight is \(48, 64, 3, 3\)"
    ):
        load_model(str(path))


# --- SD2 and SDXL as single files -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout", "parameters"),
    [("sd2", FULL_2, 865_910_724), ("sdxl", FULL_XL, 2_567_463_684)],
)
def test_every_weight_of_a_full_size_file_has_its_place(
    family: str, layout: Shapes, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2515 is the tensor count of sd_xl_base_1.0: 1680 + 248 + 197 + 390.
    assert len(FULL_XL) == 2515

    def without_memory(path: Path, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = {key: shape for key, shape in layout.items() if key.startswith(prefix)}
        return {key: torch.empty(shape, device="meta") for key, shape in found.items()}

    monkeypatch.setattr(models, "_read_tensors", without_memory)
    for part, count in (("unet", parameters), ("vae", 83_653_863)):
        module = models._convert(Path("x"), family, part, torch.float16)  # raises if one is missing
        assert sum(p.numel() for p in module.parameters()) == count
    for part, prefix in single_file.TEXT_ENCODERS[family].items():
        open_clip = prefix.endswith("model.")
        renamed = models._named_as_open_clip if open_clip else models._named_as_clip
        cls = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        config = CLIPTextConfig.from_pretrained(config_of(family, part))
        with torch.device("meta"):
            expected = {_flat(k): v.shape for k, v in cls(config).state_dict().items()}
        found = renamed(without_memory(Path("x"), prefix, torch.float32), prefix, config)
        assert {_flat(key): tensor.shape for key, tensor in found.items()} == expected


def _flat(key: str) -> str:
    """Newer releases of transformers lack the level "text_model." in one of the two classes."""
    return key.removeprefix("text_model.")


@pytest.fixture(scope="module")
def tiny_2() -> dict[str, torch.Tensor]:
    return random_weights(sd2_layout(*TINY_2))


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize(
    ("spread", "prediction", "resolution"),
    [(0.0, "epsilon", 512), (0.3, "v_prediction", 768)],
)
def test_an_sd2_file_loads_and_is_told_by_a_bias_to_predict_v(
    spread: float,
    prediction: str,
    resolution: int,
    tiny_2: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    state = tiny_2 | {name: torch.linspace(-spread, spread, 32)}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model = load_model(str(path))
    assert_frozen(model)
    assert model.scheduler.config.prediction_type == prediction
    assert (model.resolution, model.vae.config.scaling_factor) == (resolution, 0.18215)
    assert topology_of(model.unet).family == "Stable Diffusion 2"
    text = {_flat(k): v for k, v in model.text_encoder.state_dict().items()}
    first = TEXT_ENCODER_2 + "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(text["encoder.layers.0.mlp.fc1.weight"], state[first].float())
    assert model.tokenizer("a", padding="max_length").input_ids[-1] == 0  # "!"


@pytest.fixture(scope="module")
def tiny_xl() -> dict[str, torch.Tensor]:
    return random_weights(sdxl_layout(*TINY_XL))


PAIRS_XL = [
    ("unet", "add_embedding.linear_1.weight", "model.diffusion_model.label_emb.0.0.weight"),
    ("unet", "add_embedding.linear_2.bias", "model.diffusion_model.label_emb.0.2.bias"),
    (
        "unet",
        "down_blocks.2.attentions.1.transformer_blocks.1.ff.net.0.proj.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.1.ff.net.0.proj.weight",
    ),
    (
        "unet",
        "up_blocks.0.upsamplers.0.conv.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
    ),
    (
        "unet",
        "up_blocks.2.resnets.0.conv2.weight",
        "model.diffusion_model.output_blocks.6.0.out_layers.3.weight",
    ),
    ("vae", "encoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight"),
]


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_sdxl_file_loads_into_the_right_modules(
    suffix: str, tiny_xl: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(tiny_xl, path) if suffix == ".safetensors" else torch.save(tiny_xl, path)
    model = load_model(str(path), dtype=torch.bfloat16)
    assert_frozen(model)
    for part, ours, theirs in PAIRS_XL:
        loaded = getattr(model, part).state_dict()[ours]
        assert torch.equal(loaded, tiny_xl[theirs].to(loaded.dtype)), ours
    assert model.unet.dtype == torch.bfloat16
    assert model.vae.dtype == model.text_encoder_2.dtype == torch.float32
    assert (model.resolution, model.vae_scale_factor) == (1024, 8)
    assert model.vae.config.scaling_factor == 0.13025
    assert model.scheduler.config.prediction_type == "epsilon"  # without the key for v
    second = {_flat(k): v for k, v in model.text_encoder_2.state_dict().items()}
    ours, theirs = "encoder.layers.0.self_attn.{}_proj.weight", TEXT_ENCODERS_XL[1]
    joined = torch.cat([second[ours.format(name)] for name in "qkv"])
    packed = f"{theirs}transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(joined, tiny_xl[packed].float())
    projection = tiny_xl[f"{theirs}text_projection"].float()  # OpenCLIP multiplies from the right
    assert torch.equal(second["text_projection.weight"], projection.T)
    first, other = (t("a", padding="max_length").input_ids[-1] for t in model.tokenizers)
    assert (first, other) == (49407, 0)  # the end of the text, and "!"


@pytest.mark.usefixtures("tiny_configs")
def test_a_derivative_of_sdxl_with_fewer_blocks_loads_with_its_own_depths(
    tiny_xl: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As SSD-1B: fewer transformers, and half a mid block."""
    gone = ("middle_block.1.", "middle_block.2.")
    gone += tuple(f"output_blocks.{n}.1.transformer_blocks.1." for n in (0, 1))
    gone += ("input_blocks.8.1.transformer_blocks.1.",)
    fewer = {
        key: value
        for key, value in tiny_xl.items()
        if not key.removeprefix(single_file.UNET).startswith(gone)
    }
    assert len(fewer) < len(tiny_xl)
    path = tmp_path / "model.safetensors"
    save_file(fewer, path)
    unet = load_model(str(path)).unet
    topology = topology_of(unet)
    assert (topology.family, topology.mid) == ("SDXL", (0,))
    assert topology.down == ((0, 0), (1, 1), (2, 1)) and topology.up[0] == (1, 1, 2)
    ours = "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_q.weight"
    theirs = f"{single_file.UNET}output_blocks.2.1.transformer_blocks.1.attn1.to_q.weight"
    assert torch.equal(unet.get_parameter(ours), fewer[theirs].float())


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize(
    ("family", "keys"), [("tiny_state", ("v_pred",)), ("tiny_xl", ("v_pred", "ztsnr"))]
)
def test_a_file_says_by_two_keys_that_it_predicts_v(
    family: str, keys: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(request.getfixturevalue(family) | {key: torch.zeros(0) for key in keys}, path)
    scheduler = load_model(str(path)).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    ends_in_noise = scheduler.alphas_cumprod[-1] < 1e-6
    assert ends_in_noise == ("ztsnr" in keys)


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("model.diffusion_model.label_emb.0.2.bias", "unet"),
        (TEXT_ENCODERS_XL[1] + "text_projection", "text encoder 2"),
        (TEXT_ENCODERS_XL[1] + "transformer.resblocks.0.mlp.c_fc.bias", "text encoder 2"),
        (TEXT_ENCODERS_XL[0] + "text_model.final_layer_norm.bias", "text encoder"),
    ],
)
def test_a_missing_tensor_of_an_sdxl_file_is_named(
    key: str, part: str, tiny_xl: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tiny_xl.items() if k != key}, path)
    message = rf"no complete SDXL checkpoint: \d+ tensor\(s\) of the {part} are missing"
    with pytest.raises(UserError, match=message):
        load_model(str(path))


# --- files that are something else ----------------------------------------------------------------


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ONLY_UNET = {k: v for k, v in FULL.items() if k.startswith(single_file.UNET)}
ONLY_VAE = {k: v for k, v in FULL.items() if k.startswith(single_file.VAE)}
ONLY_TEXT = {k: v for k, v in FULL.items() if k.startswith(TEXT_ENCODER)}
FOREIGN: dict[str, tuple[Shapes, str]] = {
    "sdxl refiner": (
        ONLY_UNET | {TO_K: (384, 1280), "conditioner.embedders.0.model.ln_final.bias": (1280,)},
        "an SDXL refiner checkpoint",
    ),
    "sdxl u-net and vae": (
        {k: v for k, v in FULL_XL.items() if not k.startswith("conditioner.")},
        "an SDXL U-Net without the text encoder and the text encoder 2",
    ),
    "edm": (FULL_XL | {"edm_vpred.sigma_max": (1,)}, "a model of an EDM schedule"),
    "sdxl inpainting": (FULL_XL | {CONV_IN: (320, 9, 3, 3)}, "an inpainting checkpoint"),
    "sd2 without its text encoder": (
        {k: v for k, v in FULL_2.items() if not k.startswith(TEXT_ENCODER_2)},
        "a Stable Diffusion 2 U-Net without the text encoder",
    ),
    "sd2 unclip": (
        FULL_2 | {"model.diffusion_model.label_emb.0.0.weight": (1280, 2048)},
        "a Stable Diffusion 2 unCLIP checkpoint",
    ),
    "another width": (FULL | {TO_K: (320, 1000)}, "no model that is known (text width 1000)"),
    "sd3": (
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
        "a Stable Diffusion 3 model",
    ),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "a Flux model"),
    "kohya lora": ({"lora_unet_mid_block_conv1.lora_down.weight": (8, 1280)}, "a LoRA"),
    "peft lora": (
        {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (8, 1280)},
        "a LoRA",
    ),
    "vae": ({k.removeprefix(single_file.VAE): v for k, v in ONLY_VAE.items()}, "a VAE alone"),
    "prefixed vae": (ONLY_VAE, "a VAE alone"),
    "text encoder": (
        {k.removeprefix(TEXT_ENCODER): v for k, v in ONLY_TEXT.items()},
        "a text encoder alone",
    ),
    "controlnet": ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "a ControlNet"),
    "embedding": ({"emb_params": (4, 768)}, "a textual inversion embedding"),
    "inpainting": (FULL | {CONV_IN: (320, 9, 3, 3)}, "an inpainting checkpoint"),
    "pix2pix": (FULL | {CONV_IN: (320, 8, 3, 3)}, "an InstructPix2Pix checkpoint"),
    "bare u-net": (ONLY_UNET, "an SD1.5 U-Net without the VAE and the text encoder"),
    "no vae": (ONLY_UNET | ONLY_TEXT, "an SD1.5 U-Net without the VAE"),
    "diffusers u-net": (
        {"conv_in.weight": (320, 4, 3, 3), "mid_block.resnets.0.conv1.weight": (1280, 1280, 3, 3)},
        "the U-Net of a diffusers folder",
    ),
    "something else": ({"layer.weight": (3, 3)}, "no model that is known here"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, message = FOREIGN[name]
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    with pytest.raises(UserError) as raised:
        load_model(str(path))
    assert raised.value.found.startswith(f"{path} is {message}")
    assert raised.value.expected
    assert raised.value.next_step


@pytest.mark.parametrize(("layout", "family"), [(FULL, "sd15"), (FULL_2, "sd2"), (FULL_XL, "sdxl")])
def test_the_true_header_is_recognised(layout: Shapes, family: str, tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.safetensors", layout)
    assert single_file.check_single_file(path, single_file.read_header(path)) == family


def test_a_gate_file_is_refused(tmp_path: Path) -> None:
    shapes = {"mid_block.resnets.0.conv1.score": (1280,)}
    path = write_sparse(tmp_path / "g.safetensors", shapes, None, {"format": "ldcp.gates"})
    with pytest.raises(UserError, match="an LDCP gate file"):
        load_model(str(path))


BAD_BYTES = {
    "empty": (b"", "is empty"),
    "html": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "json": (b'{"error": "Invalid username or password."}', "is not a safetensors file"),
    "short": (b"Entry", "is not a safetensors file"),
    "renamed ckpt": (b"PK\x03\x04" + bytes(100), "is a PyTorch checkpoint under"),
    "damaged header": (
        struct.pack("<Q", 9) + b'{"a": [1}' + bytes(9),
        "damaged safetensors header",
    ),
    "odd metadata": (
        struct.pack("<Q", 20) + b'{"__metadata__": []}' + bytes(9),
        "damaged safetensors header",
    ),
    "odd offsets": (
        struct.pack("<Q", 53) + b'{"a": {"shape": ["b"], "data_offsets": ["c", "d"]}  }' + bytes(9),
        "damaged safetensors header",
    ),
    "too deep": (struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995, "damaged safetensors"),
    "odd header": (struct.pack("<Q", 8) + b'{"a": 1}' + bytes(9), "damaged safetensors header"),
    "cut off in the header": (struct.pack("<Q", 5000) + b'{"a":', "is cut off"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_a_file_that_is_no_model_is_explained(name: str, tmp_path: Path) -> None:
    content, message = BAD_BYTES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_model(str(path))


def test_a_truncated_file_says_how_much_is_there(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.safetensors", FULL)
    with path.open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(UserError, match=r"is cut off: it holds 1,000,000 bytes of 2,\d{3},"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\x03\x04" + bytes(50), "is cut off"), (b"\x80\x02junk", "plain weights|damaged")],
)
def test_a_bad_ckpt_is_explained(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_model(str(path))


class Payload:
    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Payload, "ran", True))


def test_code_in_a_ckpt_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "callbacks": Payload()}, path)
    with pytest.raises(
        UserError, match=r"plain weights \(it names (builtins\.)?setattr\)"
    ) as raised:
        load_model(str(path))
    assert not Payload.ran
    assert "weights_only" not in str(raised.value)  # PyTorch's advice is to run it


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
RECURSIVE: dict[str, object] = {}
RECURSIVE["state_dict"] = RECURSIVE
MALFORMED = {
    "keys that are no names": {1: torch.ones(2), FIRST: torch.ones(1)},
    "too few dimensions": {FIRST: torch.ones(320)},
    "a scalar": {FIRST: torch.ones(320, 4, 3, 3), CONTEXT: torch.tensor(1.0)},
    "itself": RECURSIVE,
    "a word": {"state_dict": "none"},
    "more than the file holds": {FIRST: torch.ones(1).expand(2**40)},
    "nowhere": {FIRST: torch.ones(320, 4, 3, 3, device="meta")},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_ckpt_is_explained(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(MALFORMED[what], path)
    with pytest.raises(UserError, match="model.ckpt is"):
        load_model(str(path))


def test_a_spanned_zip_under_a_ckpt_name_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({FIRST: torch.ones(1)}, path)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x06\x07")  # the locator of the zip64 directory: "disks" follow
    content[place + 16] = 9
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load_model(str(path))


def test_a_safetensors_file_with_a_hole_is_explained(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.safetensors", FULL)
    content = path.open("rb").read(8)
    (length,) = struct.unpack("<Q", content)
    with path.open("r+b") as file:
        file.seek(8)
        header = json.loads(file.read(length))
        name = next(key for key in header if key.startswith("model.diffusion_model."))
        header[name]["data_offsets"] = [0, 0]
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(length)[:length])
    with pytest.raises(UserError, match="is damaged"):
        load_model(str(path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(UserError, match="GGUF"):
        load_model(str(path))


# --- diffusers folders ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5's topology at small widths: VAE factor 4, 32 x 32 pixels, text width 24."""
    torch.manual_seed(0)
    files = tmp_path_factory.mktemp("tokens")
    symbols = [chr(c) for c in range(33, 127)]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "ca", "cat</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (files / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (files / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 96, 160),
        norm_num_groups=16,
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=16,
        sample_size=32,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(files, model_max_length=16),
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "pipeline"))


def test_a_small_folder_of_the_same_topology_loads(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    assert_frozen(model)
    assert (model.source, model.vae_scale_factor, model.resolution) == (str(tiny_folder), 4, 32)
    saved = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.unet.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    text, _ = embed_prompts(model, ["cat", "a cat" * 40, ""])
    assert text.shape == (3, 16, 24)
    with torch.no_grad():
        out = model.unet(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), text).sample
    assert out.shape == (3, 4, 8, 8)


def test_latents_are_the_scaled_mean_of_the_posterior(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder))
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean = encode_images(model, pixels)
    assert mean.shape == (2, 4, 8, 12)
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean * 0.5)  # 0.5 is this VAE's scaling factor
    assert torch.equal(mean, encode_images(model, pixels))


def test_a_folder_with_only_half_precision_files_loads(folder_copy: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder_copy / part / f"{name}.safetensors").rename(
            folder_copy / part / f"{name}.fp16.safetensors"
        )
    assert load_model(str(folder_copy)).unet.dtype == torch.float32


def test_a_folder_with_linear_projections_is_sd2(folder_copy: Path) -> None:
    config = folder_copy / "unet" / "config.json"
    edit_json(config, use_linear_projection=True)
    UNet2DConditionModel.from_config(json.loads(config.read_text())).save_pretrained(config.parent)
    model = load_model(str(folder_copy))
    assert topology_of(model.unet).family == "Stable Diffusion 2"
    assert embed_prompts(model, ["cat"])[0].shape == (1, 16, 24)


def test_a_folder_says_by_its_scheduler_that_it_predicts_v(folder_copy: Path) -> None:
    scheduler = folder_copy / "scheduler" / "scheduler_config.json"
    edit_json(scheduler, prediction_type="v_prediction")
    assert load_model(str(folder_copy)).scheduler.config.prediction_type == "v_prediction"


FOLDER_CHANGES = {
    "prediction_type is 'sample'": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "sample"},
    ),
    "input channels": ("unet/config.json", {"in_channels": 9}),
    "down_block_types": ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 4}),
    "layers_per_block = 1": ("unet/config.json", {"layers_per_block": 1}),
    "mid_block_type": ("unet/config.json", {"mid_block_type": None}),
    "text_encoder_2/config.json, tokenizer_2/": (
        "unet/config.json",
        {"addition_embed_type": "text_time", "block_out_channels": [16, 32, 96]},
    ),
    "the SDXL refiner": ("unet/config.json", {"addition_embed_type": "text_time"}),
    "addition_embed_type": ("unet/config.json", {"addition_embed_type": "image"}),
    "an EDM schedule": ("scheduler/scheduler_config.json", {"sigma_data": 1.0}),
    "latents_mean": ("vae/config.json", {"latents_mean": [0.0] * 4}),
    "latent channels": ("vae/config.json", {"latent_channels": 16}),
    "does not fit together": ("unet/config.json", {"cross_attention_dim": 32}),
    "a t5 model": ("text_encoder/config.json", {"model_type": "t5"}),
}


@pytest.mark.parametrize("message", FOLDER_CHANGES)
def test_a_folder_of_another_family_is_refused(message: str, folder_copy: Path) -> None:
    file, change = FOLDER_CHANGES[message]
    edit_json(folder_copy / file, **change)
    with pytest.raises(UserError, match=message) as raised:
        load_model(str(folder_copy))
    assert raised.value.expected
    assert raised.value.next_step


@pytest.mark.parametrize(
    "part",
    [
        "vae",
        "text_encoder/config.json",
        "scheduler",
        "tokenizer",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_part_is_named(part: str, folder_copy: Path) -> None:
    target = folder_copy / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(UserError, match="is incomplete|holds no weights") as raised:
        load_model(str(folder_copy))
    assert part.split("/")[0] in str(raised.value)


def test_damaged_files_in_a_folder_are_named(folder_copy: Path) -> None:
    weights = folder_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="model.safetensors is cut off.*\n.*the unet weights"):
        load_model(str(folder_copy))
    (folder_copy / "vae" / "config.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_model(str(folder_copy))


def test_transformer_pipelines_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for name, message in (
        ("StableDiffusion3Pipeline", "a Stable Diffusion 3 folder"),
        ("FluxPipeline", "a Flux folder"),
        ("PixArtAlphaPipeline", "a transformer pipeline"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer/tokenizer_config.json", "[]"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x"}'),
        ("vae/config.json", '{"block_out_channels": []}'),
    ],
)
def test_odd_files_in_a_folder_are_explained(file: str, content: str, folder_copy: Path) -> None:
    path = folder_copy / file
    if content.startswith("{"):
        content = json.dumps(json.loads(path.read_text()) | json.loads(content))
    path.write_text(content)
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(folder_copy))


def test_folders_that_are_no_pipeline_get_a_hint(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="holds model_index.json"):
        load_model(str(tmp_path))
    write_sparse(tmp_path / "sd.safetensors", FULL)
    with pytest.raises(UserError, match=r"pass the file, for example .*sd\.safetensors"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="one part of a pipeline"):
        load_model(str(tiny_folder / "unet"))


# --- paths and hub ids that lead nowhere ----------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["nowhere.safetensors", "./a/b", "a/b/c", "models\\sd", "models/sd.ckpt", "C:/sd", "name"],
)
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        load_model(source)


def test_a_hub_id_without_a_connection_says_so() -> None:
    with pytest.raises(UserError, match="hub could not be reached for some-owner/some-model"):
        load_model("some-owner/some-model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "There is no model owner/name on the hub"),
        (GatedRepoError, "accept a licence"),
        (LocalEntryNotFoundError, "could not be reached"),
    ],
)
def test_what_the_hub_answers_is_told_apart(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*args: object, **kwargs: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(models, "snapshot_download", answer)
    with pytest.raises(UserError, match=message):
        load_model("owner/name")


@pytest.mark.parametrize("folder", ["tiny_folder", "pipeline_xl"])
def test_a_hub_id_downloads_one_weight_file_per_part(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root: Path = request.getfixturevalue(folder)
    fetched = []
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(root))
    monkeypatch.setattr(models, "hf_hub_download", lambda _, name: fetched.append(name))
    assert load_model("owner/name").source == "owner/name"
    assert fetched == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        *(["text_encoder_2/model.safetensors"] if folder == "pipeline_xl" else []),
    ]
