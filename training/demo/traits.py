"""What a demo portrait shows, drawn at random from a seed, and its caption.

Variation is the point, above all *global* variation (background, light, pose, scale): those are
the things that the mid block at the lowest resolution can infer under heavy noise. The light stays
out of the captions, so it always has to be inferred.
"""

import colorsys
import math
from dataclasses import dataclass
from random import Random

RGB = tuple[int, int, int]

SKINS: list[RGB] = [
    (255, 224, 196),
    (241, 194, 155),
    (224, 172, 125),
    (198, 134, 90),
    (141, 85, 54),
    (97, 58, 38),
]
HAIR: dict[str, RGB] = {
    "black": (34, 28, 32),
    "brown": (101, 62, 34),
    "blond": (232, 196, 104),
    "red": (178, 66, 28),
    "grey": (164, 166, 172),
    "white": (238, 238, 240),
    "pink": (236, 112, 168),
    "blue": (62, 104, 196),
}
BACKGROUNDS: dict[str, RGB] = {
    "red": (205, 62, 60),
    "orange": (240, 150, 62),
    "yellow": (246, 214, 92),
    "green": (86, 166, 92),
    "blue": (64, 122, 206),
    "purple": (132, 86, 178),
    "pink": (242, 168, 192),
    "grey": (150, 154, 160),
    "white": (242, 242, 238),
    "black": (36, 36, 44),
}


@dataclass(frozen=True)
class Traits:
    """Everything that is visible in one portrait; `caption` says a part of it in words."""

    age: str  # child, young, adult, old
    female: bool
    hair: str  # short, long, curly, bald
    hair_colour: str
    beard: bool
    eyewear: str  # "", glasses, sunglasses
    mood: str  # smiling, serious, laughing
    background: str
    names_background: bool
    skin: RGB
    backdrop: str  # plain, gradient, disc, horizon
    backdrop_colours: tuple[RGB, RGB]
    clothes: RGB
    iris: RGB
    width: float  # half the head's width; half its height is about 1.25
    jaw: float  # 0 round to 1 angular
    centre: tuple[float, float]  # in image sizes
    scale: float  # in image sizes per unit
    tilt: float  # radians
    light: float  # overall brightness
    light_angle: float  # where the light comes from, radians
    light_contrast: float
    tint: tuple[float, float, float]

    @property
    def caption(self) -> str:
        """For example "a young woman with long red hair and glasses, smiling"."""
        person = (
            ("girl" if self.female else "boy")
            if self.age == "child"
            else ("woman" if self.female else "man")
        )
        prefix = {"child": "a ", "young": "a young ", "adult": "a ", "old": "an old "}[self.age]
        bald = self.hair == "bald"
        if bald:
            prefix = prefix.replace("a ", "a bald ") if self.age != "old" else "an old bald "
        things = [] if bald else [f"{self.hair} {self.hair_colour} hair"]
        things += ["a beard"] * self.beard + [self.eyewear] * bool(self.eyewear)
        text = prefix + person
        if things:
            text += " with " + " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
        text += f", {self.mood}"
        return text + f", {self.background} background" * self.names_background


def draw_traits(seed: int) -> Traits:
    """The traits of portrait `seed`."""
    rng = Random(seed)
    age = rng.choice(["child", "young", "young", "adult", "adult", "old"])
    female = rng.random() < 0.5
    styles = ["short", "long", "long", "curly"] if female else ["short", "short", "curly", "long"]
    if not female and age in ("adult", "old"):
        styles += ["bald", "bald"]
    colours = (
        ["grey", "white", "grey"]
        if age == "old"
        else (["black", "brown", "blond", "red"] * 3 + ["pink", "blue"])
    )
    background = rng.choice(list(BACKGROUNDS))
    warm = rng.uniform(-1, 1)
    return Traits(
        age=age,
        female=female,
        hair=rng.choice(styles),
        hair_colour=rng.choice(colours),
        beard=not female and age != "child" and rng.random() < 0.4,
        eyewear=rng.choices(["", "glasses", "sunglasses"], [6, 3, 1.5])[0],
        mood=rng.choice(["smiling", "serious", "laughing"]),
        background=background,
        names_background=rng.random() < 0.5,
        skin=vary(rng.choice(SKINS), rng, 10),
        backdrop=rng.choice(["plain", "gradient", "gradient", "disc", "horizon"]),
        backdrop_colours=(vary(BACKGROUNDS[background], rng, 22), _hsv(rng)),
        clothes=_hsv(rng),
        iris=rng.choice([(70, 44, 28), (60, 110, 160), (70, 130, 80)]),
        width=rng.uniform(0.84, 1.06) + 0.07 * (age == "child"),
        jaw=rng.random(),
        centre=(0.5 + rng.uniform(-0.16, 0.16), 0.47 + rng.uniform(-0.1, 0.1)),
        scale=rng.uniform(0.17, 0.31) * (0.9 if age == "child" else 1.0),
        tilt=rng.uniform(-0.3, 0.3),
        light=rng.uniform(0.6, 1.15),
        light_angle=rng.uniform(0, 2 * math.pi),
        light_contrast=rng.uniform(0.0, 0.45),
        tint=(1 + 0.14 * warm, 1.0, 1 - 0.14 * warm),
    )


def vary(colour: RGB, rng: Random, spread: int) -> RGB:
    r, g, b = (max(0, min(255, v + rng.randint(-spread, spread))) for v in colour)
    return r, g, b


def _hsv(rng: Random) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 0.85), rng.uniform(0.3, 0.95))
    return round(255 * r), round(255 * g), round(255 * b)
