"""Procedural portraits with captions: the data set of the demo, drawn instead of downloaded.

A newcomer should see gates being learned in minutes, without a GPU, a download or a licence
question. Pillow draws plain polygons in head units on a supersampled canvas, from back to front;
the same seed gives the same portrait.
"""

import math

from PIL import Image, ImageDraw

from .traits import HAIR, RGB, Traits, draw_traits

Points = list[tuple[float, float]]

SUPERSAMPLE = 3
WHITE, INK = (250, 250, 250), (40, 30, 34)


def draw_face(seed: int, size: int = 128) -> tuple[Image.Image, str]:
    """Portrait `seed` as an RGB image of `size` x `size` pixels, and its caption."""
    traits = draw_traits(seed)
    return render(traits, size), traits.caption


def render(traits: Traits, size: int = 128) -> Image.Image:
    """Draw `traits` from back to front on a supersampled canvas, light it, and reduce it."""
    image = _backdrop(traits, size * SUPERSAMPLE)
    upright, tilted = _Pen(image, traits, 0.0), _Pen(image, traits, traits.tilt)
    _draw_back_hair(tilted, traits)
    _draw_body(upright, traits)
    _draw_head(tilted, traits)
    _draw_features(tilted, traits)
    _draw_front_hair(tilted, traits)
    _draw_eyewear(tilted, traits)
    return _lit(image.reduce(SUPERSAMPLE), traits)


class _Pen:
    """Draws polygons given in head units (origin between the eyes, y down) on the canvas."""

    def __init__(self, image: Image.Image, traits: Traits, tilt: float) -> None:
        side = image.width
        self.scale = traits.scale * side
        self.origin = (traits.centre[0] * side, traits.centre[1] * side)
        self.cos, self.sin = math.cos(tilt), math.sin(tilt)
        self.draw = ImageDraw.Draw(image, "RGBA")

    def place(self, points: Points) -> Points:
        (ox, oy), s = self.origin, self.scale
        return [
            (ox + s * (self.cos * x - self.sin * y), oy + s * (self.sin * x + self.cos * y))
            for x, y in points
        ]

    def shape(self, points: Points, colour: RGB, alpha: int = 255) -> None:
        self.draw.polygon(self.place(points), fill=(*colour, alpha))

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: RGB,
        alpha: int = 255,
        arc: tuple[float, float] = (0, 360),
    ) -> None:
        self.shape(_arc(x, y, rx, ry, *arc), colour, alpha)

    def stroke(self, points: Points, width: float, colour: RGB, alpha: int = 255) -> None:
        pixels = max(1, round(width * self.scale))
        self.draw.line(self.place(points), fill=(*colour, alpha), width=pixels, joint="curve")


def _draw_back_hair(pen: _Pen, t: Traits) -> None:
    colour, w = _shade(HAIR[t.hair_colour], 0.8), t.width
    if t.hair == "long":
        pen.oval(0, -0.3, w + 0.24, 1.2, colour)
        pen.shape(
            [(-w - 0.24, -0.3), (w + 0.24, -0.3), (w + 0.42, 1.75), (-w - 0.42, 1.75)], colour
        )
    if t.hair == "curly":
        for step in range(15):
            angle = math.radians(150 + step * 240 / 14)
            pen.oval(
                (w + 0.12) * math.cos(angle), -0.25 + 1.05 * math.sin(angle), 0.36, 0.36, colour
            )


def _draw_body(pen: _Pen, t: Traits) -> None:
    shoulder = 1.35 if t.female or t.age == "child" else 1.75
    pen.shape(_arc(0, 3.3, shoulder, 1.75, 180, 360) + [(shoulder, 6), (-shoulder, 6)], t.clothes)
    neck = 0.34 if t.female or t.age == "child" else 0.46
    pen.oval(0, 1.72, neck * 1.5, 0.3, _shade(t.skin, 0.8))
    pen.shape([(-neck, 0.8), (neck, 0.8), (neck, 1.75), (-neck, 1.75)], _shade(t.skin, 0.8))


def _draw_head(pen: _Pen, t: Traits) -> None:
    w = t.width
    for side in (-1, 1):
        pen.oval(side * w, 0.1, 0.17, 0.27, _shade(t.skin, 0.9))
    chin = 1.18 if t.age == "child" else 1.3
    power = 1.0 - 0.3 * t.jaw  # below 1 the lower half grows more angular
    lower = [
        (w * math.copysign(abs(math.cos(a)) ** power, math.cos(a)), chin * math.sin(a))
        for a in (math.pi * i / 30 for i in range(31))
    ]
    pen.shape(lower + _arc(0, 0, w, 1.2, 180, 360), t.skin)
    far = -1 if math.cos(t.light_angle) > 0 else 1  # the cheek away from the light
    shadow = [(x * far, y) for x, y in lower if x >= 0.0]
    pen.shape(
        [*shadow, (0.45 * w * far, 0.8 * chin), (0.62 * w * far, 0.0)], _shade(t.skin, 0.6), 90
    )
    if t.age != "old":
        for side in (-1, 1):
            pen.oval(side * 0.56 * w, 0.42, 0.2, 0.15, (240, 90, 90), 60)


def _draw_features(pen: _Pen, t: Traits) -> None:
    hair = HAIR[t.hair_colour]
    dark = _shade(t.skin, 0.62)
    if t.beard:
        pen.shape(
            _arc(0, 0.38, 0.92 * t.width, 1.08, 0, 180) + _arc(0, 0.42, 0.74, 0.1, 180, 360), hair
        )
        pen.oval(0, 0.56, 0.42, 0.14, hair)
    big = 1.25 if t.age == "child" else 1.0
    for side in (-1, 1):
        x = side * 0.4 * t.width
        pen.oval(x, 0.0, 0.2 * big, 0.14 * big, WHITE)
        pen.oval(x, 0.0, 0.11 * big, 0.12 * big, t.iris)
        pen.oval(x, 0.0, 0.055 * big, 0.06 * big, INK)
        pen.stroke(_arc(x, 0.0, 0.21 * big, 0.15 * big, 185, 355), 0.06 if t.female else 0.04, INK)
        lift = {"serious": 0.0, "smiling": 0.03, "laughing": 0.08}[t.mood]
        pen.stroke(
            _arc(x, -0.2 - lift, 0.24, 0.1, 200, 340),
            0.05 if t.female else 0.085,
            _shade(hair, 0.75),
        )
    pen.stroke([(0.02, 0.08), (0.1, 0.38), (-0.07, 0.41)], 0.05, dark)
    if t.age == "old":
        for y in (-0.5, -0.64, -0.78):
            pen.stroke(_arc(0, y + 0.12, 0.42, 0.13, 215, 325), 0.035, dark)
        for side in (-1, 1):
            pen.stroke([(side * 0.28, 0.42), (side * 0.44, 0.72)], 0.045, dark)
            pen.stroke(_arc(side * 0.4 * t.width, 0.06, 0.22, 0.15, 30, 150), 0.035, dark)
    _draw_mouth(pen, t)


def _draw_mouth(pen: _Pen, t: Traits) -> None:
    lip = (190, 50, 66) if t.female else _shade(t.skin, 0.55)
    if t.mood == "serious":
        pen.stroke([(-0.26, 0.76), (0.26, 0.76)], 0.09, lip)
    elif t.mood == "smiling":
        pen.stroke(_arc(0, 0.58, 0.38, 0.24, 15, 165), 0.085, lip)
    else:
        pen.oval(0, 0.62, 0.4, 0.42, lip, arc=(0, 180))
        pen.oval(0, 0.64, 0.33, 0.33, (110, 24, 34), arc=(0, 180))
        pen.shape([(-0.33, 0.64), (0.33, 0.64), (0.29, 0.75), (-0.29, 0.75)], WHITE)


def _draw_front_hair(pen: _Pen, t: Traits) -> None:
    colour, w = HAIR[t.hair_colour], t.width
    if t.hair in ("short", "long"):
        fringe = -0.42 if t.hair == "short" else -0.3
        part = 0.35 * w if t.jaw > 0.5 else -0.35 * w
        pen.shape(
            _arc(0, -0.12, w + 0.1, 1.24, 180, 360)
            + [
                (w + 0.02, 0.05),
                (0.8 * w, fringe),
                (part, fringe - 0.3),
                (-0.8 * w, fringe),
                (-w - 0.02, 0.05),
            ],
            colour,
        )
    if t.hair == "curly":
        for step in range(8):
            angle = math.radians(195 + step * 150 / 7)
            pen.oval(0.86 * w * math.cos(angle), -0.42 + 0.62 * math.sin(angle), 0.29, 0.29, colour)


def _draw_eyewear(pen: _Pen, t: Traits) -> None:
    for side in (-1, 1) if t.eyewear else ():
        x = side * 0.41 * t.width
        if t.eyewear == "sunglasses":
            pen.oval(x, 0.02, 0.33, 0.28, (24, 24, 30))
        else:
            pen.oval(x, 0.02, 0.32, 0.3, WHITE, 50)
            pen.stroke(_arc(x, 0.02, 0.32, 0.3, 0, 360), 0.065, INK)
        pen.stroke([(0, -0.04), (side * 0.14, -0.04)], 0.06, INK)
        pen.stroke([(side * t.width, -0.05), (x + side * 0.3, -0.02)], 0.05, INK)


def _backdrop(t: Traits, side: int) -> Image.Image:
    first, second = t.backdrop_colours
    image = Image.new("RGB", (side, side), first)
    draw = ImageDraw.Draw(image)
    if t.backdrop == "gradient":
        image.paste(
            Image.new("RGB", image.size, _shade(first, 0.45)),
            mask=_ramp(side, t.light_angle + t.tilt),
        )
    elif t.backdrop == "disc":
        x, y, r = t.centre[0] * side, t.centre[1] * side, 2.0 * t.scale * side
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_mix(first, second, 0.5))
    elif t.backdrop == "horizon":
        draw.rectangle((0, (0.3 + 0.5 * t.jaw) * side, side, side), fill=_mix(first, second, 0.6))
    return image


def _lit(image: Image.Image, t: Traits) -> Image.Image:
    """Global light: darken away from the light, then brightness and colour temperature."""
    black = Image.new("RGB", image.size)
    ramp = _ramp(image.width, t.light_angle).point(lambda v: v * t.light_contrast)
    image = Image.composite(black, image, ramp)
    gains = [t.light * g for g in t.tint]
    return image.point([min(255, round(v * g)) for g in gains for v in range(256)])


def _ramp(side: int, angle: float) -> Image.Image:
    """A mask rising linearly from 0 towards `angle` to 255 away from it."""
    cell = 16
    dx, dy = math.cos(angle), math.sin(angle)
    reach = abs(dx) + abs(dy)
    values = [
        round(127.5 * (1 - (dx * (2 * x / (cell - 1) - 1) + dy * (2 * y / (cell - 1) - 1)) / reach))
        for y in range(cell)
        for x in range(cell)
    ]
    mask = Image.new("L", (cell, cell))
    mask.putdata(values)
    return mask.resize((side, side), Image.Resampling.BILINEAR)


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> Points:
    """Points on an ellipse from `start` to `stop` degrees, clockwise with y down."""
    count = 24
    angles = (math.radians(start + (stop - start) * i / count) for i in range(count + 1))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _shade(colour: RGB, factor: float) -> RGB:
    r, g, b = (min(255, round(v * factor)) for v in colour)
    return r, g, b


def _mix(first: RGB, second: RGB, share: float) -> RGB:
    r, g, b = (round(p + share * (q - p)) for p, q in zip(first, second, strict=True))
    return r, g, b
