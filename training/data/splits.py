"""Which images a fit holds out: one decision, written into its gate file and read from there.

It does not depend on a fit's seed, so that gates of several seeds can be compared on images that
none of them was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from training.config import FitConfig
from training.data.images import ImageData
from training.errors import UserError
from training.provenance import is_number, is_whole, read


@dataclass(frozen=True)
class Split:
    """Held out are ``fraction`` of the images, by ``seed``; of a stream the first ``rows``."""

    fraction: float = FitConfig.validation_fraction
    seed: int = 0
    rows: int | None = None

    @classmethod
    def of(cls, config: FitConfig) -> Split:
        """What a fit holds out."""
        if config.streaming:
            return cls(rows=config.validation_samples if config.validation_fraction else 0)
        return cls(config.validation_fraction)

    @classmethod
    def of_file(cls, info: Mapping[str, Any], name: str) -> Split | None:
        """What the gates of this description held out; None where they were made without images.

        Files of before this was written down chose by the fit's own seed. Raises UserError for a
        description that makes no sense; ``name`` is the file's.
        """
        config = read(info, "config", {}, lambda v: isinstance(v, Mapping), "settings", name)
        found = read(info, "held_out", {}, lambda v: isinstance(v, Mapping), "a split", name)
        if not config and not found:
            return None
        if not found:
            names = {"fraction": "validation_fraction", "seed": "seed"}
            if config.get("streaming") is True and config.get("validation_fraction") != 0:
                names |= {"rows": "validation_samples"}
            found = {key: config[of] for key, of in names.items() if of in config}
        return cls(
            read(found, "fraction", cls.fraction, _is_share, "a number from 0 up to 1", name),
            read(found, "seed", cls.seed, is_whole, "a whole number", name),
            read(found, "rows", None, lambda v: is_whole(v) and v >= 0, "0 or more", name),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def apply(self, images: ImageData) -> tuple[list[int], list[int]]:
        """Indices to train on, and those held out."""
        if self.rows is None:
            return images.split(self.fraction, self.seed)
        everything = list(range(len(images)))
        return everything[self.rows :], everything[: self.rows]


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value < 1


def unseen(images: ImageData, splits: Iterable[Split | None]) -> tuple[list[int], list[int]]:
    """Indices of the images that some gates may have seen, and of those that all of them held out.

    Raises UserError when there is none.
    """
    chosen = {split for split in splits if split is not None} or {Split()}
    held_out = set.intersection(*(set(split.apply(images)[1]) for split in chosen))
    if not held_out:
        raise UserError(
            f"No image of {images.source} was held out by all of these gates.",
            "gates that held out the same images",
            "evaluate files of other settings (--validation-fraction) one by one, or train again",
        )
    return [i for i in range(len(images)) if i not in held_out], sorted(held_out)
