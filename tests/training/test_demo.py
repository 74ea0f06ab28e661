"""The demo pipeline: drawn faces vary, the files are what they claim, and the mid block matters."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

from training.demo.check import (  # noqa: E402  (after the skips above)
    MID,
    PIPELINE,
    effect,
    layer_names,
    load_pipeline,
    losses,
    make_probe,
)
from training.demo.denoiser import (  # noqa: E402
    DepthSampler,
    Float32Attention,
    SkipSampler,
    TransformerSampler,
    new_unet,
)
from training.demo.faces import draw_face  # noqa: E402
from training.demo.text import MAX_TOKENS, learn_merges  # noqa: E402
from training.demo.traits import draw_traits  # noqa: E402

IMAGES = PIPELINE.parent / "images"
MEGABYTE = 1_000_000


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_the_same_seed_draws_the_same_face():
    first, second = draw_face(5), draw_face(5)
    assert first[1] == second[1]
    assert first[0].size == (128, 128) and first[0].mode == "RGB"
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))


def test_faces_vary_globally():
    means = np.stack([np.asarray(draw_face(seed, 32)[0]).mean((0, 1)) for seed in range(60)])
    assert means.std(0).min() > 25  # of 255, in every colour channel
    assert len({draw_face(seed, 32)[1] for seed in range(60)}) > 50


@pytest.mark.parametrize("seed", range(40))
def test_the_caption_says_what_was_drawn(seed: int):
    traits, caption = draw_traits(seed), draw_face(seed, 32)[1]
    assert ("glasses" in caption.replace("sunglasses", "")) == (traits.eyewear == "glasses")
    assert ("sunglasses" in caption) == (traits.eyewear == "sunglasses")
    assert ("beard" in caption) == traits.beard
    assert ("bald" in caption) == (traits.hair == "bald")
    assert (f"{traits.hair} {traits.hair_colour} hair" in caption) == (traits.hair != "bald")
    assert (f"{traits.background} background" in caption) == traits.names_background
    assert traits.mood in caption
    assert {"woman", "man", "girl", "boy"} & set(caption.replace(",", "").split())


def test_merging_follows_pair_frequency():
    # "ab" occurs three times ("abc" twice, "abd" once), so it is merged before its endings;
    # then "ab c</w>" (twice) comes before "ab d</w>" (once).
    assert learn_merges(["abc abc abd"]) == [("a", "b"), ("ab", "c</w>"), ("ab", "d</w>")]


def test_every_caption_word_is_one_token(pipe):
    caption = "a young woman with long red hair and glasses, smiling"
    ids = pipe.tokenizer(caption, padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_TOKENS == pipe.text_encoder.config.max_position_embeddings
    words = len(caption.replace(",", " ,").split())
    assert sum(i != pipe.tokenizer.eos_token_id for i in ids) == words + 1  # and the start token
    assert "".join(pipe.tokenizer.tokenize("xyzzy")).replace("</w>", "") == "xyzzy"


def test_the_pipeline_is_small_and_has_the_topology_of_sd15(pipe):
    assert size_of(PIPELINE) <= 12 * MEGABYTE
    config = pipe.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn"
    assert (config.in_channels, config.out_channels, config.layers_per_block) == (4, 4, 2)
    assert tuple(config.attention_head_dim) == (1, 2, 4, 8)
    assert len(layer_names(pipe.unet)) == 22 + 16 * 3
    schedule = pipe.scheduler.config
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    assert (schedule.beta_schedule, schedule.steps_offset) == ("scaled_linear", 1)
    assert (schedule.prediction_type, schedule.clip_sample) == ("epsilon", False)


def test_the_mid_block_works_on_a_4x4_map(pipe):
    shapes = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda _m, _a, out: shapes.append(out.shape))
    losses(pipe.unet, make_probe(pipe, 2))
    handle.remove()
    assert [tuple(shape[-2:]) for shape in shapes] == [(4, 4)]


def test_the_latents_have_unit_scale(pipe):
    drawn = np.stack([np.asarray(draw_face(3_000_000 + i)[0]) for i in range(16)])
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert 0.7 < latents.std() < 1.4


def test_zeroing_the_mid_block_raises_the_loss(pipe):
    probe = make_probe(pipe, 24, lowest_step=500)
    found = effect(pipe.unet, probe, losses(pipe.unet, probe), *MID)
    assert found.increase > 0.01
    assert found.increase > 2.5 * found.error


def test_sample_images_match_their_captions():
    lines = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == len(list(IMAGES.rglob("*.png"))) >= 200
    assert size_of(IMAGES) <= 2.5 * MEGABYTE
    for index in (0, len(lines) - 1):
        assert lines[index]["file_name"] == f"00000/{index:05d}.png"
        image, caption = draw_face(1_000_000 + index)
        stored = Image.open(IMAGES / lines[index]["file_name"]).convert("RGB")
        error = np.abs(np.asarray(stored, dtype=float) - np.asarray(image, dtype=float)).mean()
        assert lines[index]["text"] == caption and error < 8  # palette images


@pytest.fixture
def busy_unet():
    """Fresh, but with every branch at work: residuals and lower skip connections start at zero."""
    torch.manual_seed(0)
    unet = new_unet(64).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return unet


@torch.no_grad()
def three_outputs(unet, make_sampler, **counts):
    """Before, with a sampler that leaves something out for the second of two samples, after."""
    inputs = torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.randn(2, 24, 64)
    before = unet(*inputs).sample
    sampler = make_sampler(unet)
    for name, value in counts.items():
        setattr(sampler, name, value)
    partly = unet(*inputs).sample
    sampler.detach()
    return before, partly, unet(*inputs).sample


@pytest.mark.parametrize(
    "make_sampler, counts",
    [
        (lambda unet: TransformerSampler(unet, 0), {"count": 1}),
        (lambda unet: TransformerSampler(unet, 2), {"count": 1}),
        (SkipSampler, {"count": 1, "top_count": 2}),
        (SkipSampler, {"count": 2, "top_count": 1}),
    ],
)
def test_a_sampler_leaves_out_its_part_for_the_rest_of_a_batch(busy_unet, make_sampler, counts):
    before, partly, after = three_outputs(busy_unet, make_sampler, **counts)
    assert torch.allclose(before[0], partly[0], atol=1e-4 * before.abs().max())
    assert (before[1] - partly[1]).abs().max() > 1e-2 * before.abs().max()
    assert torch.equal(before, after)


def test_the_lowest_level_sometimes_has_the_mid_block_alone(busy_unet):
    torch.manual_seed(1)  # the draws that follow leave the branches out for one sample of two
    before, partly, after = three_outputs(busy_unet, DepthSampler)
    differs = (before - partly).abs().amax((1, 2, 3)) > 1e-3 * before.abs().max()
    assert sorted(differs.tolist()) == [False, True]
    assert torch.equal(before, after)


@torch.no_grad()
def test_attention_outside_autocast_is_the_same_attention(busy_unet):
    inputs = torch.randn(2, 4, 32, 32), torch.tensor([10, 900]), torch.randn(2, 24, 64)
    before = busy_unet(*inputs).sample
    seen = []
    query = busy_unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    busy_unet.set_attn_processor(Float32Attention())
    assert torch.equal(busy_unet(*inputs).sample, before)
    query.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        busy_unet(*inputs)
    assert seen == [torch.float32]


def test_without_skip_connections_the_input_shows_only_through_the_lowest_level(busy_unet):
    sampler = SkipSampler(busy_unet)  # keeps none
    handle = busy_unet.mid_block.register_forward_hook(lambda _m, _a, output: 0 * output)
    step, states = torch.tensor([500]), torch.randn(1, 24, 64)
    with torch.no_grad():
        one, two = (busy_unet(torch.randn(1, 4, 32, 32), step, states).sample for _ in range(2))
    handle.remove()
    sampler.detach()
    assert torch.equal(one, two)
