"""Captioned emoji: what the package holds is drawn as the caption says."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

from training.demo import build  # noqa: E402  (after the skips above)
from training.demo.check import (  # noqa: E402
    changes,
    head_groups,
    load_pipeline,
    losses,
    make_probe,
    other_captions,
    without_heads,
    zeroed,
)
from training.demo.denoiser import CONTINUED, train_denoiser  # noqa: E402
from training.demo.emoji import (  # noqa: E402
    FACE_EVERY,
    SUBCATEGORIES,
    EmojiPictures,
    read_emoji,
)
from training.demo.text import tokenize, with_tokens, write_tokenizer  # noqa: E402
from training.demo.traits import BACKGROUNDS  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.options import DEMO  # noqa: E402

RED, GREEN = (255, 0, 0, 255), (0, 255, 0, 255)


def package(path: Path, entries: list[dict[str, object]], colours: dict[str, tuple]) -> Path:
    """A file like that of `npm pack`: emoji.json and pictures of one colour each."""
    contents = {"package/emoji.json": json.dumps(entries).encode()}
    for name, colour in colours.items():
        buffer = io.BytesIO()
        Image.new("RGBA", (64, 64), colour).save(buffer, "PNG")
        contents[f"package/img/google/64/{name}"] = buffer.getvalue()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def entry(name: str, image: str, subcategory: str = SUBCATEGORIES[0], there: bool = True):
    return {"name": name, "image": image, "subcategory": subcategory, "has_img_google": there}


@pytest.fixture
def file(tmp_path):
    entries = [
        entry("CHERRIES", "a.png"),
        entry("ANTENNA BARS", "b.png", subcategory="av-symbol"),
        entry("LIME", "c.png"),
        entry("DRAWN BY OTHERS ALONE", "none.png", there=False),
    ]
    return package(tmp_path / "e.tgz", entries, {"a.png": RED, "b.png": RED, "c.png": GREEN})


@pytest.fixture
def emoji(file):
    return read_emoji(file)


def test_the_emoji_of_the_subcategories_are_read_with_their_names(emoji):
    assert [one.name for one in emoji] == ["cherries", "lime"]
    assert [one.pixels.getpixel((9, 9)) for one in emoji] == [RED, GREEN]


def test_another_file_is_refused_with_a_next_step(tmp_path):
    (tmp_path / "text.tgz").write_text("no archive")
    foreign = package(tmp_path / "foreign.tgz", [entry("LIME", "c.png")], {})
    for path in (tmp_path / "text.tgz", foreign, tmp_path / "missing.tgz"):
        with pytest.raises(UserError, match="npm pack emoji-datasource-google"):
            read_emoji(path)


def seeds(count: int) -> list[int]:
    return [seed for seed in range(count) if seed % FACE_EVERY]


def test_the_same_seed_draws_the_same_picture(emoji):
    draw = EmojiPictures(emoji)
    (first, caption), (second, same) = draw(5), draw(5)
    assert caption == same and np.array_equal(np.asarray(first), np.asarray(second))
    assert first.size == (128, 128) and first.mode == "RGB"
    assert len({draw(seed)[1] for seed in seeds(100)}) > 40


def test_the_caption_says_what_was_drawn_and_where(emoji):
    draw = EmojiPictures(emoji)
    for seed in seeds(200):
        picture, caption = draw(seed)
        pixels = np.asarray(picture).astype(int)
        colour = (RED if "cherries" in caption else GREEN)[:3]
        rows, columns = np.nonzero((pixels == colour).all(-1))
        side = (rows.max() - rows.min() + 1) / 128
        x, y = columns.mean() / 128 - 0.5, rows.mean() / 128 - 0.5
        assert ("small" in caption) == (side < 0.65) or abs(side - 0.65) < 0.01
        assert ("large" in caption) == (side > 0.85) or abs(side - 0.85) < 0.01
        for word, offset in {"left": -x, "right": x, "top": -y, "bottom": y}.items():
            assert (word in caption) == (offset > 0.08) or abs(offset - 0.08) < 0.01
        for name, shade in BACKGROUNDS.items():
            if f"{name} background" in caption:
                background = pixels[(pixels != colour).any(-1)][0]
                assert np.abs(background - shade).max() <= 22


def test_some_pictures_are_faces(emoji):
    captions = [EmojiPictures(emoji)(seed, 32)[1] for seed in range(0, 10 * FACE_EVERY)]
    people = ("woman", "man", "girl", "boy")
    assert sum(any(word in caption.split() for word in people) for caption in captions) == 10


def test_a_build_starts_from_the_demo_and_goes_on_where_it_stopped(file, tmp_path, monkeypatch):
    def run(minutes: float) -> int:
        arguments = f"--emoji {file} --output {tmp_path}/model --work {tmp_path}/work"
        monkeypatch.setattr(
            "sys.argv", ["build", *arguments.split(), "--denoiser-minutes", minutes]
        )
        assert build.main() == 0
        return torch.load(tmp_path / "work" / "denoiser.pt", weights_only=True)["step"]

    recipes = []

    def train(state, latents, ids, empty_ids, recipe, every):
        recipes.append(recipe)
        train_denoiser(state, latents, ids, empty_ids, recipe, every)

    monkeypatch.setattr(build, "train_denoiser", train)
    monkeypatch.setattr(build, "TRAIN_COUNT", 8)
    monkeypatch.setattr(build, "MONITOR_COUNT", 4)
    steps = run("0.05")
    assert steps > 1
    assert run("0.0001") == steps  # fewer minutes than it had: nothing is left to do
    assert recipes == [replace(CONTINUED, seconds=seconds) for seconds in (3.0, 0.006)]
    pipe, demo = load_pipeline(tmp_path / "model"), load_pipeline()
    assert same_weights(pipe.vae, demo.vae) and not same_weights(pipe.unet, demo.unet)
    assert pipe.tokenizer.tokenize("cherries") == ["cherries</w>"]


@torch.no_grad()
def test_a_text_encoder_keeps_the_tokens_it_knows(pipe, tmp_path):
    tokenizer = write_tokenizer(["a man on a red zeppelin"], tmp_path)
    text = with_tokens(pipe.text_encoder, pipe.tokenizer, tokenizer)
    for caption in ("a man", "red", ""):  # but zeppelin
        new, old = (
            model(tokenize(words, [caption])).last_hidden_state
            for model, words in ((text, tokenizer), (pipe.text_encoder, pipe.tokenizer))
        )
        assert torch.equal(new, old)
    vocabulary = json.loads(
        (DEMO / "pipeline" / "tokenizer" / "vocab.json").read_text(encoding="utf-8")
    )
    shared = [token for token in tokenizer.get_vocab() if len(token.removesuffix("</w>")) == 1]
    assert {token: tokenizer.get_vocab()[token] for token in shared} == {
        token: vocabulary[token] for token in shared
    }
    assert tokenizer.tokenize("zeppelin") == ["zeppelin</w>"] != pipe.tokenizer.tokenize("zeppelin")


def same_weights(one, other) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@torch.no_grad()
def test_both_halves_of_the_heads_together_are_the_attention(pipe):
    """Without any head an attention still adds the bias of its projection, which `zeroed` takes."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    low, high = (heads for found, heads in head_groups(pipe.unet) if found == name)
    assert (low, high) == (range(4), range(4, 8))
    attention = pipe.unet.get_submodule(name)
    hidden = torch.randn(1, 16, attention.to_q.in_features)
    states = torch.randn(1, 24, attention.to_k.in_features)
    bias = attention.to_out[0].bias
    intact = attention(hidden, states) - bias
    halves = []
    for heads in (low, high):
        with without_heads(pipe.unet, name, heads):
            halves.append(intact - (attention(hidden, states) - bias))
    assert min(half.abs().max() for half in halves) > 1e-3 * intact.abs().max()
    assert torch.allclose(sum(halves), intact, atol=1e-5 * intact.abs().max())
    with zeroed(pipe.unet, name):
        assert not attention(hidden, states).any()
    assert torch.equal(attention(hidden, states) - bias, intact)


def test_every_layer_and_every_half_of_heads_is_zeroed_in_turn(pipe):
    labels = [label for label, _ in changes(pipe.unet)]
    # 22 ResBlocks, 16 transformers of three parts; the 5 at the top have one head in an attention
    assert len(labels) == len(set(labels)) == 22 + 3 * 16 + 2 * 2 * 11


def test_captions_are_replaced_by_the_next_and_by_none(pipe):
    probe = make_probe(pipe, 3)
    (_, shifted), (_, empty) = other_captions(pipe, probe)
    assert torch.equal(shifted.states[1], probe.states[0])
    assert torch.equal(empty.states[0], empty.states[2])
    assert not torch.equal(empty.states[0], probe.states[0])
    assert torch.equal(shifted.noisy, probe.noisy)
    assert not torch.equal(losses(pipe.unet, shifted), losses(pipe.unet, probe))
