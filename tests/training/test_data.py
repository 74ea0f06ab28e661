"""Reading training images: every mode, every way a file can be bad, and their order."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from pictures import RED, draw, ids, png, read
from PIL import Image, ImageFile

from training.data import images as data_module
from training.data.images import (
    BrokenImage,
    ImageData,
    decode_image,
    open_dataset,
    open_image,
    to_pixels,
)
from training.errors import UserError

# --- decoding -------------------------------------------------------------------------------------


def pixel(image: Image.Image) -> list[float]:
    return to_pixels(image, 1).flatten().tolist()


def test_values_and_the_centre_crop() -> None:
    # 6 x 2 pixels: black, red, black in squares of 2; the centre square is the red one.
    image = Image.new("RGB", (6, 2))
    image.paste(RED, (2, 0, 4, 2))
    assert to_pixels(image, 2).tolist() == [[[1.0] * 2] * 2, [[-1.0] * 2] * 2, [[-1.0] * 2] * 2]
    assert to_pixels(image.transpose(Image.Transpose.ROTATE_90), 2)[0].tolist() == [[1.0] * 2] * 2


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 51, [-0.6, -0.6, -0.6]),  # 51 / 127.5 - 1
        ("1", 1, [1, 1, 1]),
        ("LA", (0, 0), [1, 1, 1]),  # fully transparent: white
        ("RGBA", (255, 0, 0, 255), [1, -1, -1]),
        ("RGBA", (255, 0, 0, 0), [1, 1, 1]),
        ("I;16", 65535, [1, 1, 1]),
        ("I;16", 13107, [-0.6, -0.6, -0.6]),  # a fifth of 65535, as 51 is of 255
        ("P", 0, [-1, -1, -1]),
    ],
)
def test_every_png_mode_becomes_rgb(mode: str, colour: object, expected: list[float]) -> None:
    found = pixel(decode_image(png(colour, mode)))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (4, 4), 7)
    image.putpalette([0] * 21 + [255, 0, 0])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=7)
    assert pixel(decode_image(stream.getvalue())) == [1, 1, 1]


def test_cmyk_becomes_rgb() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(stream, "JPEG", quality=100)
    assert pixel(decode_image(stream.getvalue())) == pytest.approx([1, -1, -1], abs=0.03)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the left half comes to the top
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    upright = decode_image(stream.getvalue())
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 1)) == (255, 255, 255)
    assert upright.getpixel((2, 6)) == (0, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "MPO"])
def test_the_documented_formats_are_decoded(format: str) -> None:
    stream = io.BytesIO()  # MPO: what many cameras write as jpg
    Image.new("RGB", (16, 16), RED).save(stream, format)
    assert pixel(decode_image(stream.getvalue())) == pytest.approx([1, -1, -1], abs=0.03)


@pytest.mark.parametrize("format", ["EPS", "GIF", "PPM", "TGA", "ICO", "PCX", "PDF"])
def test_no_other_decoder_is_reached_whatever_a_file_is_called(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), RED).save(path, format)
    for file in (path.read_bytes(), path):
        with pytest.raises(ValueError, match="not a png, jpg, webp, bmp or tiff image"):
            decode_image(file) if isinstance(file, bytes) else open_image(file)


def test_images_are_opened_in_one_place() -> None:
    root = Path(data_module.__file__).parents[2]
    sources = [
        f for room in ("training", "nodes", "ldcp_core") for f in (root / room).rglob("*.py")
    ]
    opening = {f.relative_to(root).as_posix() for f in sources if "Image.open(" in f.read_text()}
    assert opening == {"training/data/images.py"}


@pytest.mark.parametrize("side", [9_500, 13_500])  # from twice the limit on Pillow itself refuses
def test_the_size_is_checked_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(0, "1", (side, side))
    assert len(content) < 100_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="9500 x 9500 pixels; at most 89,|more than 89,"):
        decode_image(content)


def _truncated_png() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()[:5000]


def _truncated_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[:2000]


BROKEN = {
    "truncated png": (_truncated_png(), "truncated"),
    "truncated jpeg": (_truncated_jpeg(), "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not a png, jpg"),
    "web page": (b"<!DOCTYPE html><html></html>", "not a png, jpg"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "png of nothing": (png()[:20], ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_skipped_counted_and_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, reason = BROKEN[name]
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    (tmp_path / "c.png").write_bytes(content)
    draw(tmp_path / "d.png")
    data = open_dataset(str(tmp_path), resolution=8)
    assert data.broken_report() == ""
    assert list(read(data, range(4), 2, epochs=2)) == [["a.png", "d.png"]] * 2
    assert list(data.broken) == ["b.png", "c.png"]
    assert reason in data.broken["b.png"]
    assert data.broken_report().startswith("2 of 4 images could not be read")
    assert "c.png" in data.broken_report()
    assert caplog.text.count("Skipping the broken image b.png") == 1  # at once, the first time only
    with pytest.raises(BrokenImage, match="b.png"):
        data.pixels(1)


def test_only_broken_images_end_the_run_instead_of_looping(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    data = open_dataset(str(tmp_path), resolution=8)
    with pytest.raises(UserError, match=r"None of the 1 image\(s\).*a\.png: the file is empty"):
        next(read(data, [0], 1, seed=0, epochs=None))


def test_the_example_of_only_broken_images_is_one_of_those_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"junk")
    (tmp_path / "b.png").write_bytes(b"")
    data = open_dataset(str(tmp_path), resolution=8)
    with pytest.raises(BrokenImage, match="a.png"):
        data.pixels(0)
    with pytest.raises(UserError, match=r"None of the 1 image\(s\).*b\.png: the file is empty"):
        next(read(data, [1], 1))


def test_small_images_are_enlarged_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, size=(8, 6))
    data = open_dataset(str(tmp_path), resolution=16)
    assert data.pixels(0).shape == data.pixels(1).shape == (3, 16, 16)
    assert caplog.text.count("smaller than 16") == 1


def test_the_resolution_must_be_known_before_reading(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match="resolution"):
        open_dataset(str(tmp_path)).pixels(0)


# --- split and order ------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> ImageData:
    for i in range(20):
        draw(tmp_path / "faces" / f"{i:02d}.png", (i, i, i))
    return open_dataset(str(tmp_path / "faces"), resolution=4)


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.1, 2), (0.01, 1), (0.5, 10), (0.94, 19), (0.0, 0)]
)
def test_the_split_is_disjoint_complete_and_of_the_right_size(
    fraction: float, held_out: int, faces: ImageData
) -> None:
    training, validation = faces.split(fraction, seed=0)
    assert len(validation) == held_out
    assert sorted(training + validation) == list(range(20))


def test_the_split_follows_the_seed_and_the_names_alone(faces: ImageData) -> None:
    assert faces.split(0.3, seed=1) == faces.split(0.3, seed=1)
    assert faces.split(0.3, seed=1) != faces.split(0.3, seed=2)
    # Written down once, so that another platform or version splits the same way.
    assert faces.split(0.1, seed=0)[1] == [12, 13]


def test_too_few_images_for_a_split_is_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "a.png")
    data = open_dataset(str(tmp_path / "one"))
    with pytest.raises(UserError, match="leaves none to train on"):
        data.split(0.1, seed=0)
    assert data.split(0, seed=0) == ([0], [])


def seen(data: ImageData, **options: object) -> list[str]:
    return [id for batch in read(data, range(len(data)), 3, **options) for id in batch]


def test_batches_repeat_exactly_with_a_seed_and_differ_between_epochs(faces: ImageData) -> None:
    first, again = (seen(faces, seed=5, epochs=2) for _ in range(2))
    assert first == again != seen(faces, seed=6, epochs=2)
    assert sorted(first[:20]) == sorted(first[20:]) == ids(faces)
    assert first[:20] != first[20:]
    assert seen(faces) == ids(faces)  # no seed: the order given


def test_batches_have_the_size_asked_for_and_the_last_holds_the_rest(faces: ImageData) -> None:
    assert [len(batch) for batch in read(faces, range(20), 8, seed=0)] == [8, 8, 4]
    for i in range(20):  # image i is drawn in grey level i
        assert faces.records[i].id == f"{i:02d}.png"
        assert ((faces.pixels(i) + 1) * 127.5).round().unique().tolist() == [i]


def test_an_endless_iterator_goes_on_past_the_first_epoch(faces: ImageData) -> None:
    endless = read(faces, [3, 4], 1, seed=0, epochs=None)
    assert len([next(endless) for _ in range(9)]) == 9
    assert list(read(faces, [], 1, epochs=None)) == []


def test_a_broken_image_does_not_disturb_the_others(faces: ImageData, tmp_path: Path) -> None:
    before = seen(faces, seed=5)
    (tmp_path / "faces" / "07.png").write_bytes(b"broken")
    assert seen(faces, seed=5) == [id for id in before if id != "07.png"]


def test_warnings_go_through_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with (
        caplog.at_level(logging.WARNING, logger="training.data.images"),
        pytest.raises(BrokenImage),
    ):
        open_dataset(str(tmp_path), resolution=4).pixels(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
