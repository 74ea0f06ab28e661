"""The table in docs/compatibility.md, written from what the tests measured.

LDCP_COMPATIBILITY=one.json python -m pytest tests/nodes/test_node_compatibility.py
python tests/nodes/compatibility.py one.json [another host's.json ...]
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from features import FEATURES, OTHERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN = "<!-- compatibility: written by tests/nodes/compatibility.py -->"
END = "<!-- compatibility: end -->"

Row = tuple[str, str]  # feature, how ComfyUI loads the weights


@dataclass
class Measured:
    """What the tests found on one ComfyUI: for each row the largest relative difference, with
    "rows" alone removed and with "all" gates."""

    host: str
    rows: dict[Row, dict[str, float]]


def add_row(path: Path, host: str, feature: str, loading: str, errors: dict[str, float]) -> None:
    """Add what one test measured to a file; what it holds of another ComfyUI is dropped."""
    found = read(path) if path.is_file() else Measured(host, {})
    rows = found.rows if found.host == host else {}
    rows[feature, loading] = errors
    listed = [[*row, errors] for row, errors in rows.items()]
    path.write_text(json.dumps({"host": host, "rows": listed}, indent=1), encoding="utf-8")


def read(path: Path) -> Measured:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Measured(found["host"], {(f, loading): e for f, loading, e in found["rows"]})


def host(comfyui: Path) -> str:
    """The version of a ComfyUI."""
    text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def expected_rows() -> list[Row]:
    """Every row of the table, in its order."""
    measured = [(feature.name, loading) for feature in FEATURES for loading in feature.loading]
    return measured + [(other.name, "") for other in OTHERS]


def rows_of(readme: str) -> list[Row]:
    """The rows that a page has."""
    table = readme[readme.index(BEGIN) : readme.index(END)]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(feature, loading) for feature, loading, _ in cells]


def rounded_up(error: float) -> str:
    """One significant digit, not below the value.

    >>> rounded_up(3.1e-7), rounded_up(4e-7)
    ('4e-07', '4e-07')
    """
    exponent = math.floor(math.log10(error))
    digit = math.ceil(round(error / 10**exponent, 6))
    return f"{digit * 10.0**exponent:.0e}"


def result(errors: dict[str, float]) -> str:
    rows = "exact" if errors["rows"] == 0 else f"within {rounded_up(errors['rows'])}"
    return f"{rows}; folded within {rounded_up(errors['all'])}"


def table(hosts: list[Measured]) -> str:
    """The Markdown between the markers; each row has the largest error of any host."""
    lines = ["| with | weights loaded | result |", "|---|---|---|"]
    for name, loading in expected_rows():
        found = [host.rows[name, loading] for host in hosts if (name, loading) in host.rows]
        if loading and len(found) != len(hosts):
            raise SystemExit(f"{name} ({loading}) was not measured on every host")
        worst = {key: max(one[key] for one in found) for key in ("rows", "all")} if found else None
        text = result(worst) if worst else next(o.result for o in OTHERS if o.name == name)
        lines.append(f"| {name} | {loading} | {text} |")
    versions = " and ".join(sorted((host.host for host in hosts), key=version_key))
    lines += ["", f"Measured with ComfyUI {versions} on a CPU."]
    return "\n".join(lines)


def version_key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit(__doc__)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    hosts: dict[str, Measured] = {}
    for measured in (read(Path(path)) for path in paths):  # a host's rows may lie in several
        hosts.setdefault(measured.host, Measured(measured.host, {})).rows.update(measured.rows)
    new = table(list(hosts.values()))
    PAGE.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
