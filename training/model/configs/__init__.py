"""What Stable Diffusion 1.5, 2 and XL look like: small configs, and how to tell them apart.

`sd15/`, `sd2/` and `sdxl/` hold the configs and the tokenizer data that a single-file checkpoint
lacks, so that such a file loads without a download. `single_file` and `folder` recognise what a
source really is from headers and configs alone, before any weight is read.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent
#: families that training takes
NAMES = {"sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL"}


def config_of(family: str, part: str) -> Path:
    """The folder with the config of a part; what others share with SD1.5 lies in `sd15/` alone.

    >>> config_of("sdxl", "text_encoder").relative_to(CONFIGS).as_posix()
    'sd15/text_encoder'
    """
    own = CONFIGS / family / part
    return own if own.is_dir() else CONFIGS / "sd15" / part
