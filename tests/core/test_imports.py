"""Importing the core must stay cheap: ComfyUI pays for it at every start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("diffusers", "transformers", "datasets", "accelerate", "matplotlib", "comfy")
ROOMS = ("nodes", "training")


def test_importing_the_core_loads_no_training_library_and_no_host() -> None:
    code = "import json, sys; import ldcp_core; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(out.stdout)}
    assert "ldcp_core" in loaded and "torch" in loaded
    assert not loaded & {*HEAVY, *ROOMS}
