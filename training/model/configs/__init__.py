"""What Stable Diffusion 1.5 looks like: its small configs, and how to tell it from its relatives.

`sd15/` holds the configs and the tokenizer data that a single-file checkpoint lacks, so that such
a file loads without a download. `single_file` and `folder` recognise what a source really is from
headers and configs alone, before any weight is read.
"""

from pathlib import Path

SD15 = Path(__file__).parent / "sd15"
