"""Whether a push is a release that the Comfy Registry can take.

    python .ci/release.py OLD_PYPROJECT NEW_PYPROJECT

Prints ``publish=true`` when the version differs from the one before (or there was none before),
``publish=false`` when it doesn't. A release whose metadata are not filled in is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import tomllib

#: the registry's rules: letters and digits with single . - _ between, the first a letter
NAME = re.compile(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*")
VERSION = re.compile(r"\d+\.\d+\.\d+")


def problems(pyproject: dict[str, Any]) -> list[str]:
    """What keeps the registry, or a reader of its page, from taking this version."""
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    repository = project.get("urls", {}).get("Repository", "")
    found = []
    if not NAME.fullmatch(project["name"]) or len(project["name"]) >= 100:
        found.append(f"project.name {project['name']!r} is no name for the registry")
    if not VERSION.fullmatch(project["version"]):
        found.append(f"project.version {project['version']!r} is not X.Y.Z")
    if not comfy.get("PublisherId"):
        found.append("tool.comfy.PublisherId is empty: write the id behind the @ of your profile")
    # the addresses are those of who publishes; until they are filled in, nothing is released
    for key, url in (("project.urls.Repository", repository), ("tool.comfy.Icon", comfy["Icon"])):
        if not url.startswith("https://") or "..." in url:
            found.append(f"{key} {url!r} is a placeholder: write the address of this repository")
    return found


def main(old: str, new: str) -> int:
    pyproject = tomllib.loads(Path(new).read_text(encoding="utf-8"))
    before = Path(old).read_text(encoding="utf-8") if Path(old).is_file() else ""
    known = tomllib.loads(before).get("project", {}).get("version")
    if pyproject["project"]["version"] == known:
        print("publish=false")
        return 0
    found = problems(pyproject)
    if found:
        print(
            "pyproject.toml is not ready for the Comfy Registry:",
            *found,
            sep="\n- ",
            file=sys.stderr,
        )
        return 1
    print("publish=true")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
