"""Latents and prompt embeddings on disk: the same as computed, shared, interrupted, damaged."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pictures import draw, png, read
from torch import Tensor

from ldcp_core import load_gates
from training import fit
from training.data import cache as cache_module
from training.data import encoding, stamps
from training.data import images as data_module
from training.data.cache import SHARD, TensorCache, default_cache
from training.data.encoding import CachedImages, FreshImages
from training.data.images import open_dataset
from training.errors import UserError
from training.model.load import DiffusionModel, load_model
from training.step.denoising import Denoising

FORBIDDEN: Callable[..., Any] = lambda *_, **__: pytest.fail("something was computed again")  # noqa: E731


def numbers(indices: Sequence[int]) -> Iterator[Tensor | str]:
    for index in indices:
        yield "odd one out" if index == 300 else torch.full((2,), float(index))


STAMPS = [f"item {i}" for i in range(600)]  # shards of 256, 256 and 88


@pytest.fixture
def built(tmp_path: Path) -> TensorCache:
    found = TensorCache(tmp_path / "c", STAMPS)
    found.build(numbers, "numbers")
    return found


# --- shards ---------------------------------------------------------------------------------------


def test_what_was_computed_comes_back_from_disk(built: TensorCache, tmp_path: Path) -> None:
    again = TensorCache(tmp_path / "c", STAMPS)
    again.build(FORBIDDEN, "numbers")
    for index in (0, 255, 256, 301, 599):
        assert torch.equal(again[index], torch.full((2,), float(index)))
    assert again.broken == {300: "odd one out"}
    with pytest.raises(KeyError):
        again[300]
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_an_item_is_a_copy(built: TensorCache) -> None:
    built[5].zero_()
    assert built[5].tolist() == [5, 5]


def test_only_the_shard_with_other_content_is_computed_again(
    built: TensorCache, tmp_path: Path
) -> None:
    computed: list[int] = []

    def watched(indices: Sequence[int]) -> Iterator[Tensor | str]:
        computed.extend(indices)
        yield from numbers(indices)

    changed = TensorCache(tmp_path / "c", [*STAMPS[:-1], "another"])
    changed.build(watched, "numbers")
    assert computed == list(range(2 * SHARD, 600))


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    def interrupted(indices: Sequence[int]) -> Iterator[Tensor | str]:
        for index, value in zip(indices, numbers(indices), strict=True):
            if index == 400:
                raise KeyboardInterrupt
            yield value

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path, STAMPS).build(interrupted, "numbers")
    computed: list[int] = []

    def watched(indices: Sequence[int]) -> Iterator[Tensor | str]:
        computed.extend(indices)
        yield from numbers(indices)

    TensorCache(tmp_path, STAMPS).build(watched, "numbers")
    assert computed == list(range(SHARD, 600))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "another format"])
def test_a_damaged_shard_is_made_again_and_said(
    built: TensorCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    del built  # nothing is mapped any more
    file = sorted((tmp_path / "c").iterdir())[0]
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 8
    elif damage == "another format":
        content = content.replace(b"ldcp.cache.1", b"ldcp.cache.9")
    else:
        content = content[: len(content) // 2] if damage == "cut" else bytearray()
    file.write_bytes(content)
    again = TensorCache(tmp_path / "c", STAMPS)
    again.build(numbers, "numbers")
    assert f"{file} is damaged" in caplog.text and "making it again" in caplog.text
    assert all(again[i].tolist() == [i, i] for i in range(600) if i != 300)


def test_processes_share_the_work_without_overlap(tmp_path: Path) -> None:
    computed: dict[int, list[int]] = {0: [], 1: []}
    for rank in (0, 1):

        def watched(indices: Sequence[int], rank: int = rank) -> Iterator[Tensor | str]:
            computed[rank].extend(indices)
            yield from numbers(indices)

        # both look before the other one writes
        TensorCache(tmp_path / f"of {rank}", STAMPS).build(watched, "numbers", rank, 2)
    assert sorted(computed[0] + computed[1]) == list(range(600))
    assert computed[1] == list(range(SHARD, 2 * SHARD))


def test_a_full_disk_keeps_what_is_there_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = cache_module.write_atomically, iter(range(9))

    def write(path: Path, data: bytes) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, data)

    monkeypatch.setattr(cache_module, "write_atomically", write)
    with pytest.raises(UserError, match=r"No space left(.|\n)*--no-cache"):
        TensorCache(tmp_path, STAMPS).build(numbers, "numbers")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_cache() == Path(tmp_path.parents[0] / "cache")  # the tests' own
    monkeypatch.delenv("LDCP_CACHE")
    monkeypatch.setattr(cache_module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "ldcp"


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def encoded(model: DiffusionModel, images: Path, tmp_path: Path) -> CachedImages:
    found = CachedImages(open_dataset(str(images), resolution=16), model, tmp_path / "images")
    found.build(model)
    return found


def test_batches_are_those_without_a_cache_to_the_bit(
    encoded: CachedImages, model: DiffusionModel, images: Path
) -> None:
    data = open_dataset(str(images), resolution=16)
    plain = FreshImages(data, model).batches(range(20), 3, seed=1, epochs=2)
    cached = encoded.batches(range(20), 3, seed=1, epochs=2)
    for a, b in zip(plain, cached, strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.latents, b.latents) and torch.equal(a.context, b.context)
    problem = Denoising(model, 0).problem(b)
    assert problem.noisy.shape == b.latents.shape


def test_captions_are_embedded_once_each(
    model: DiffusionModel, images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "captioned"
    data.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))[:4]):
        (data / f"{i}.png").write_bytes(file.read_bytes())
        (data / f"{i}.txt").write_text(["a face", "a cat"][i % 2])
    found = CachedImages(open_dataset(str(data), resolution=16), model, tmp_path / "c")
    found.build(model)
    batch = next(found.batches(range(4), 4))
    assert torch.equal(batch.context[0], batch.context[2])
    assert not torch.equal(batch.context[0], batch.context[1])
    assert len(found.embeddings._rows) == 2


def test_a_broken_image_is_known_without_reading_it_again(
    model: DiffusionModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for file in sorted(images.rglob("*.png"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "00001.png").write_bytes(b"broken")
    for attempt in range(2):
        data = open_dataset(str(folder), resolution=16)
        found = CachedImages(data, model, tmp_path / "c")
        found.build(model)
        assert [b.ids for b in found.batches(range(3), 3)] == [["00000.png", "00002.png"]]
        assert data.broken == {
            "00001.png": "not a png, jpg, webp, bmp or tiff image, whatever its name says"
        }, attempt
        monkeypatch.setattr(encoding, "encode_images", FORBIDDEN)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_is_named_and_nothing_is_lost(
    model: DiffusionModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(cache_module, "SHARD", 8)  # 20 images: shards of 8, 8 and 4
    decode = data_module.decode_image

    def fail(data: bytes) -> Any:
        if data == doomed:
            raise MemoryError
        return decode(data)

    data = open_dataset(str(images), resolution=16)
    doomed = data.records[9].read()
    found = CachedImages(data, model, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "decode_image", fail)
        with pytest.raises(UserError, match=r"00009.png: MemoryError(.|\n)*fewer --workers"):
            found.build(model, workers=workers)
    assert not data.broken  # the image itself is fine
    assert len(list(tmp_path.glob("c/latents-*/*"))) == 1
    read: list[int] = []
    again = CachedImages(data, model, tmp_path / "c")
    monkeypatch.setattr(again, "_decoded", lambda i: read.append(i) or data.square(i))
    again.build(model, workers=workers)
    assert sorted(read) == list(range(8, 20))


def test_what_a_latent_depends_on_is_in_its_address(
    encoded: CachedImages, model: DiffusionModel, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, pipeline: Path,
) -> None:  # fmt: skip
    def folders(data: Any, with_model: DiffusionModel) -> tuple[str, str]:
        found = CachedImages(data, with_model, tmp_path)
        return found.latents._paths[0].as_posix(), found.embeddings._paths[0].as_posix()

    data = open_dataset(str(images), resolution=16)
    latents, prompts = folders(data, model)
    assert folders(open_dataset(str(images), resolution=16), model) == (latents, prompts)
    larger = folders(open_dataset(str(images), resolution=24), model)
    assert larger[0] != latents and larger[1] == prompts

    other = load_model(str(pipeline))
    with torch.no_grad():
        other.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert folders(data, other)[0] != latents and folders(data, other)[1] == prompts
    other = load_model(str(pipeline))
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[0, 0] += 1e-6
    assert folders(data, other)[0] == latents and folders(data, other)[1] != prompts
    monkeypatch.setattr(encoding, "CROP", "another")
    assert folders(data, model)[0] != latents


def test_the_address_is_of_the_content_and_not_of_the_place(
    model: DiffusionModel, images: Path, tmp_path: Path
) -> None:
    def first(root: Path) -> Path:
        return CachedImages(open_dataset(str(root), resolution=16), model, tmp_path).latents._paths[
            0
        ]

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in images.rglob("*.png"):
        (copy / file.name).write_bytes(file.read_bytes())
    assert first(copy) == first(images)
    picture = copy / "00003.png"
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 1
    picture.write_bytes(content)
    assert first(copy) != first(images)


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".png"])
def test_an_image_edited_in_place_gets_another_address(
    model: DiffusionModel, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "SETTLED", -1)  # as if the file had been there for long
    folder = tmp_path / "faces"
    picture = draw(folder / f"a{suffix}", size=(200, 200))

    def stamp() -> list[str]:
        return open_dataset(str(folder)).stamps(tmp_path / "c")

    before, content, times = stamp(), bytearray(picture.read_bytes()), picture.stat()
    content[len(content) // 3] ^= 1
    picture.write_bytes(content)
    if os.name != "nt":  # which has no time of change beside the time of modification
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stamp() != before


def test_a_saved_data_set_edited_in_place_gets_another_address(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"png": [png(size=(300, 300))] * 2})
    table.save_to_disk(tmp_path / "faces")
    before = open_dataset(str(tmp_path / "faces")).stamps(tmp_path / "c")
    shutil.copytree(tmp_path / "faces", tmp_path / "copy")
    assert open_dataset(str(tmp_path / "copy")).stamps(tmp_path / "c") == before
    file = next((tmp_path / "copy").glob("*.arrow"))
    content = file.read_bytes()
    file.write_bytes(content.replace(b"IDAT", b"IDAX", 1))
    assert open_dataset(str(tmp_path / "copy")).stamps(tmp_path / "c") != before


def test_files_that_did_not_change_are_not_read_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stamps, "SETTLED", -1)
    before = open_dataset(str(images)).stamps(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stamps, "_stamp", FORBIDDEN)
        assert open_dataset(str(images)).stamps(tmp_path) == before
    (file,) = tmp_path.glob("stamps-*.json")
    file.write_text("junk")
    assert open_dataset(str(images)).stamps(tmp_path) == before
    assert "reading all images again" in caplog.text
    monkeypatch.setattr(stamps, "SETTLED", 10**18)  # a file that is being written
    file.unlink()
    open_dataset(str(images)).stamps(tmp_path)
    assert not file.exists()


def test_an_image_without_a_caption_to_read_is_skipped_until_it_has_one(
    model: DiffusionModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for file in sorted(images.rglob("*.png"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "00000.png", "text": "half of \\ud83d"}\n'
        f'{{"file_name": "00001.png", "text": "{"x" * 70_000}"}}\n'
    )
    for shown in (["00000.png", "00002.png"], ["00000.png", "00001.png", "00002.png"]):
        data = open_dataset(str(folder), resolution=16)
        found = CachedImages(data, model, tmp_path / "c")
        found.build(model)
        assert [b.ids for b in found.batches(range(3), 3)] == [shown]
        assert list(read(data, range(3), 3)) == [shown]
        assert ("a caption of 70,000" in data.broken_report()) == (len(shown) == 2)
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        monkeypatch.setattr(encoding, "encode_images", FORBIDDEN)


# --- a fit ----------------------------------------------------------------------------------------


@pytest.fixture
def run(
    pipeline: Path, images: Path, tmp_path: Path, short_fits: None, no_pictures: None
) -> Callable[..., int]:
    def run(*more: str) -> int:
        return fit.main([
            "--model", str(pipeline), "--data", str(images), "--max-steps", "3",
            "--gradient-accumulation", "1",
            "--output", str(tmp_path / "gates.safetensors"), *more,
        ])  # fmt: skip

    return run


def test_a_fit_from_the_cache_equals_one_without(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gates.safetensors"
    assert run("--no-cache") == 0
    assert not (tmp_path / "c").exists()
    plain = load_gates(file)
    assert run("--cache", str(tmp_path / "c")) == 0
    built = load_gates(file)
    monkeypatch.setattr(encoding, "encode_images", FORBIDDEN)
    monkeypatch.setattr(encoding, "embed_prompts", FORBIDDEN)
    assert run("--cache", str(tmp_path / "c")) == 0
    for found in (built, load_gates(file)):
        assert all(torch.equal(found.scores[site], plain.scores[site]) for site in plain.scores)
        assert found.info["history"] == plain.info["history"]


def test_a_folder_whose_name_is_not_utf_8_goes_through(
    run: Callable[..., int], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    try:
        shutil.copytree(images, folder)
    except OSError:  # APFS and NTFS: such a name can't come up there
        pytest.skip("this file system takes UTF-8 names only")
    output = folder / "gates.safetensors"
    assert run("--data", str(folder), "--output", str(output)) == 0
    shutil.copy(output, tmp_path / "gates.safetensors")  # safetensors opens no such path
    assert load_gates(tmp_path / "gates.safetensors").info["data"]["source"] == "f\\udcff"
    assert "f\\udcff" in output.with_suffix(".html").read_text(encoding="utf-8")
    assert "f\\udcff" in capsys.readouterr().out


def test_vae_and_text_encoder_leave_memory_before_learning(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[weakref.ref[Any]] = []
    load, steps = fit.frozen_model, fit.run

    def watched(*arguments: Any, **options: Any) -> DiffusionModel:
        model = load(*arguments, **options)
        parts.extend(weakref.ref(part) for part in (model.vae, model.text_encoder))
        return model

    def checked(*arguments: Any) -> None:
        gc.collect()
        assert [part() for part in parts] == [None, None]
        steps(*arguments)

    monkeypatch.setattr(fit, "frozen_model", watched)
    monkeypatch.setattr(fit, "run", checked)
    assert run() == 0


def test_a_cache_that_cannot_be_written(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING)
    (tmp_path / "file").write_text("in the way")
    assert run("--cache", str(tmp_path / "file")) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file'} is no folder" in error and "change --cache" in error
    monkeypatch.setenv("LDCP_CACHE", str(tmp_path / "file"))
    assert run() == 0  # nobody asked for it: the fit does without
    assert "Going on without a cache" in caplog.text
