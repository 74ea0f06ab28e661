"""Metrics of images: against values worked out by hand, and with stand-ins for the networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from training.data.images import open_dataset
from training.errors import UserError
from training.evaluation import images as image_quality
from training.evaluation.distances import cmmd, fid, kid, precision_recall
from training.evaluation.images import clip_scores, compare_images, pair_metrics, vae_features
from training.evaluation.networks import Clip, Inception, Networks, Vgg, load_networks
from training.evaluation.reference import Reference
from training.model.load import _clip_tokenizer

FACES = ["a face", "a dog's face"]
VAE = AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=8,
)


class TinyInception(nn.Module):
    """Called as StyleGAN2-ADA's inception-2015-12-05.pt is: uint8 images, return_features."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8 and return_features
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 1).flatten(1)


class TinyVgg(nn.Module):
    """Called as StyleGAN2-ADA's vgg16.pt is; its embedding is the image itself, scaled."""

    def forward(
        self,
        images: Tensor,
        resize_images: bool = True,
        return_features: bool = False,
        return_lpips: bool = False,
    ) -> Tensor:
        assert return_features != return_lpips
        if return_lpips:
            assert not resize_images
            return images.float().flatten(1) / 255
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for each network under its usual name."""
    root = tmp_path_factory.mktemp("metrics")
    torch.jit.script(TinyInception()).save(str(root / "inception-2015-12-05.pt"))
    torch.jit.script(TinyVgg()).save(str(root / "vgg16.pt"))
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=CLIPTextConfig(**small).to_dict(),
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8).to_dict(),
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(root / "clip")
    _clip_tokenizer().save_pretrained(root / "clip")
    side = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def networks(weights: Path) -> Networks:
    found = load_networks(None, None, None, weights, "cpu")
    assert found.notes == ()
    return found


def draw(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """An image of plain noise, 16 pixels wide, for each seed."""
    folder.mkdir()
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:03d}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    draw(tmp_path / "real", range(100, 106))
    return Reference(open_dataset(str(tmp_path / "real"), resolution=16), tmp_path / "cache")


# --- distances ------------------------------------------------------------------------------------


def test_fid_is_the_distance_of_two_gaussians() -> None:
    # The means (0, 0) and (3, 4) are 25 apart. Of four points, ±a on an axis and two on the other,
    # the variance along that axis is 2a² / 3: 2 for a² = 3, 8 for a² = 12. Covariances diag(2, 2)
    # and diag(8, 2): Tr(Σ + Σ' − 2(ΣΣ')^½) = (2 + 8 − 2·4) + (2 + 2 − 2·2) = 2.
    a, b = math.sqrt(3), math.sqrt(12)
    real = torch.tensor([[a, 0], [-a, 0], [0, a], [0, -a]])
    fake = torch.tensor([[3 + b, 4], [3 - b, 4], [3, 4 + a], [3, 4 - a]])
    assert fid(real, fake) == pytest.approx(27, abs=1e-4)
    assert fid(real, real) == pytest.approx(0, abs=1e-4)


def test_kid_is_the_cubic_kernels_mmd() -> None:
    # D = 1, k = (xy + 1)³. real {0, 1}: k(0, 1) = 1. fake {1, 2}: k(1, 2) = 27.
    # across: k(0, 1) = k(0, 2) = 1, k(1, 1) = 8, k(1, 2) = 27, mean 37 / 4.
    mean, deviation = kid(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    assert mean == pytest.approx(1 + 27 - 2 * 37 / 4) and deviation == pytest.approx(0)


def test_kid_repeats_and_leaves_the_random_numbers_alone() -> None:
    real, fake = torch.randn(7, 3), torch.randn(5, 3)
    state = torch.random.get_rng_state()
    assert kid(real, fake) == kid(real, fake)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_cmmd_is_the_gaussian_kernels_mmd() -> None:
    # distances: real 10, fake 20, across 30, 10 from 0 and 40, 20 from 10 (σ = 10)
    def k(distance: float) -> float:
        return math.exp(-(distance**2) / 200)

    real, fake = torch.tensor([[0.0], [10.0]]), torch.tensor([[-30.0], [-10.0]])
    across = (k(30) + k(10) + k(40) + k(20)) / 4
    assert cmmd(real, fake) == pytest.approx(1000 * (k(10) + k(20) - 2 * across), rel=1e-6)


def test_precision_and_recall_count_points_within_the_other_manifold() -> None:
    # nearest neighbours: real 0-1-2 within 1 of each other, 10 has its at 8; fake 2.5, 30, 31
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[2.5], [30.0], [31.0]])
    # 2.5 is within 1 of 2; 30 and 31 are 20 and 21 from 10, whose radius is 8: 1 of 3.
    # radii of fake are 27.5, 1, 1: all of real is within 27.5 of 2.5: 4 of 4.
    assert precision_recall(real, fake, neighbour=1) == pytest.approx((1 / 3, 1))
    # second neighbours: radii of real 2, 1, 2, 9; still 1 of 3, since 30 is 20 away
    assert precision_recall(real, fake, neighbour=2)[0] == pytest.approx(1 / 3)
    assert precision_recall(fake, real, neighbour=1) == pytest.approx((1, 1 / 3))


def test_clip_scores_take_the_prompts_in_turn_and_stop_at_zero() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.0, -1.0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([100, 80, 60, 0])


def test_image_metrics_agree_with_scikit_image() -> None:
    pytest.importorskip("torchmetrics")
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(0)
    one = generator.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    two = np.clip(one + 25 * generator.normal(size=one.shape), 0, 255).astype(np.uint8)
    of = pair_metrics(Networks(), 48, [])
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (one, two))
    assert of["PSNR"](a, b) == pytest.approx(metrics.peak_signal_noise_ratio(one, two), rel=1e-4)
    ssim = metrics.structural_similarity(
        one,
        two,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert of["SSIM"](a, b) == pytest.approx(ssim, abs=2e-3)
    assert of["L1"](a, b) == pytest.approx(abs(one / 255 - two / 255).mean(), rel=1e-5)


def test_the_vae_compares_directions_of_its_maps_at_every_position() -> None:
    one, other = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        x = VAE.encoder.conv_in(torch.cat([one, other]).float() / 127.5 - 1)
        expected = 0.0
        for block, side in zip(VAE.encoder.down_blocks, (8, 8), strict=True):
            x = block(x)
            assert x.shape[-1] == side
            a, b = x / x.square().sum(1, keepdim=True).sqrt()
            expected += float((a - b).square().sum() / side**2)
    distance = vae_features(VAE)
    assert distance(one, other) == pytest.approx(expected, rel=1e-5) and expected > 0.01
    assert distance(one, one) == 0
    assert not any(block._forward_hooks for block in VAE.encoder.down_blocks)


def test_images_against_dense_ones_have_an_interval_and_distances_a_rank(
    tmp_path: Path, reference: Reference
) -> None:
    pixels = {"dense": 100, "near": 110, "far": 200}
    paths = {}
    for name, value in pixels.items():
        (tmp_path / name).mkdir()
        paths[name] = [tmp_path / name / f"{n}.png" for n in range(4)]
        for n, path in enumerate(paths[name]):
            Image.fromarray(np.full((16, 16, 3), value + n, dtype=np.uint8)).save(path)
    found = compare_images(paths, FACES, Networks(), reference, VAE).single
    assert found["near"]["L1"]["interval"] == pytest.approx((10 / 255, 10 / 255))
    assert (found["near"]["L1"]["rank"], found["far"]["L1"]["rank"]) == (1, 2)
    assert "rank" not in found["near"].get("SSIM", {})


# --- networks -------------------------------------------------------------------------------------


def test_lpips_is_the_squared_distance_of_the_embeddings(networks: Networks) -> None:
    assert networks.vgg is not None
    one = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    other = one.clone()
    other[0, 0, 0, :2] = 255  # two of the stand-in's 48 coordinates differ by one
    assert networks.vgg.lpips(one, other) == pytest.approx(2)


def test_clip_features_are_those_of_the_model(weights: Path, networks: Networks) -> None:
    assert networks.clip is not None
    model = CLIPModel.from_pretrained(weights / "clip")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    processor = CLIPImageProcessor.from_pretrained(weights / "clip")
    shown = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
    tokens = _clip_tokenizer()(FACES, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**tokens, **processor(shown, return_tensors="pt"))
    assert torch.allclose(networks.clip.features(images), wanted.image_embeds, atol=1e-5)
    assert torch.allclose(networks.clip.texts(FACES), wanted.text_embeds, atol=1e-5)


def test_missing_weights_are_named_and_the_rest_goes_on(
    tmp_path: Path, reference: Reference
) -> None:
    networks = load_networks(None, None, None, tmp_path / "metrics", "cpu")
    paths = {"dense": draw(tmp_path / "dense", range(4)), "half": draw(tmp_path / "half", range(4))}
    found = compare_images(paths, FACES, networks, reference, VAE)
    text = "\n".join(found.notes)
    for metrics, name, option in (
        ("FID and KID", "inception-2015-12-05.pt", "--inception"),
        ("LPIPS, precision and recall", "vgg16.pt", "--vgg"),
        ("CLIP score and CMMD", "clip", "--clip"),
    ):
        where = tmp_path / "metrics" / name
        assert f"{metrics} not measured: put {name} (" in text
        assert f"at {where}, or give it with {option}" in text
    assert found.single["half"]["L1"]["maximum"] == 0  # the same seeds, the same noise
    assert found.single["half"]["VAE features"]["maximum"] == 0
    assert set(found.single["dense"]) == {"diversity (L1)"}
    assert found.sets == {"dense": {}, "half": {}}


def test_a_file_that_is_not_a_network_is_named(tmp_path: Path, weights: Path) -> None:
    wrong = tmp_path / "vgg16.pt"
    wrong.write_bytes(b"not a network")
    for options in ((None, str(wrong), None), (None, None, str(tmp_path))):
        with pytest.raises(UserError, match="can't be loaded") as error:
            load_networks(*options, weights, "cpu")
        assert "get it again" in str(error.value)


# --- sets of images -------------------------------------------------------------------------------


def test_sets_are_compared_by_every_network_that_is_there(
    tmp_path: Path, networks: Networks, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_quality, "MINIMUM", 4)
    # dense drew the very images of the reference, half others
    paths = {
        "dense": draw(tmp_path / "dense", range(100, 106)),
        "half": draw(tmp_path / "half", range(6)),
    }
    found = compare_images(paths, FACES, networks, reference, VAE)
    of_dense, of_half = found.sets["dense"], found.sets["half"]
    assert set(of_dense) == {"FID", "KID", "KID std", "CMMD", "precision", "recall"}
    assert of_dense["precision"] == of_dense["recall"] == 1
    assert of_dense["FID"] == pytest.approx(0, abs=1e-6)
    assert of_half["FID"] > 1e-4
    assert of_half["CMMD"] > of_dense["CMMD"]  # below zero, unbiased as it is
    assert {"LPIPS", "CLIP score", "diversity (LPIPS)"} <= set(found.single["half"])
    assert found.notes == ["MS-SSIM needs images of more than 160 pixels: left out"]


def test_too_few_images_get_a_note_instead_of_a_figure(
    tmp_path: Path, networks: Networks, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"dense": draw(tmp_path / "dense", range(3))}
    found = compare_images(paths, FACES[:1], networks, reference, VAE)
    assert found.sets == {"dense": {}}
    text = "\n".join(found.notes)
    for metrics in ("FID and KID", "precision and recall", "CMMD"):
        assert f"{metrics} not given: fewer would say little, that is 100 images; 3 were" in text
    monkeypatch.setattr(image_quality, "MINIMUM", 3)
    few = Networks(inception=networks.inception)
    found = compare_images(paths, FACES[:1], few, reference, VAE)  # 3 images of 3 features
    assert set(found.sets["dense"]) == {"KID", "KID std"}
    assert "FID not given: its covariance needs more images than features, that is 4" in "\n".join(
        found.notes
    )


@pytest.mark.parametrize("kind", ["inception", "vgg", "clip"])
def test_features_of_the_reference_are_computed_once(
    networks: Networks, reference: Reference, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: Inception | Vgg | Clip = getattr(networks, kind)
    first = reference.features(network)
    assert len(first) == 6
    with monkeypatch.context() as patch:
        patch.setattr(type(network), "features", lambda *_: pytest.fail("computed again"))
        again = Reference(reference.data, reference._folder).features(network)
    assert torch.equal(again, first)
    # another image under the same name, and the cache no longer fits
    other = draw(Path(reference.data.source).parent / "other", [7])[0]
    (Path(reference.data.source) / "100.png").write_bytes(other.read_bytes())
    changed = Reference(open_dataset(reference.data.source, resolution=16), reference._folder)
    differ = (changed.features(network) != first).any(1)
    assert differ.tolist() == [True, False, False, False, False, False]


def test_broken_images_of_the_reference_are_left_out(
    networks: Networks, reference: Reference
) -> None:
    assert networks.inception is not None
    folder = Path(reference.data.source)
    (folder / "broken.png").write_bytes(b"not an image")
    more = Reference(open_dataset(str(folder), resolution=16), reference._folder)
    assert torch.equal(more.features(networks.inception), reference.features(networks.inception))
    assert list(more.data.broken) == ["broken.png"]
