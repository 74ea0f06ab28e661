"""What a fit did, as one HTML file that needs nothing beside it: to mail, to keep, to compare."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ldcp_core import Gates, gates_report, one_line

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tfoot td { font-weight: 600; }
img { max-width: 100%; }
.samples { image-rendering: pixelated; min-width: 60%; }
"""
#: characters of a setting, such as a list of all sites by name
LONGEST = 4000


def html_report(
    gates: Gates, curves: bytes, scores: bytes, samples: bytes | None, notes: Sequence[str] = ()
) -> str:
    """The page; pictures are PNG files, ``notes`` lines to say at the top."""
    lines = [*gates_report(gates).gates_lines(), *"\n".join(notes).splitlines()]
    parts = [
        "<h1>Pruning gates</h1>",
        *(f"<p>{escape(one_line(line, LONGEST))}</p>" for line in lines),
        "<h2>What it saves</h2>",
        _costs(gates),
        "<h2>Course of the fit</h2>",
        _image(curves, "losses, λ and sparsity over the steps"),
        "<h2>Scores per site</h2>",
        _image(scores, "sorted scores of every site"),
        "<h2>Samples</h2>",
    ]
    if samples is None:
        parts.append("<p>None were drawn (see --sample-every).</p>")
    else:
        parts.append("<p>Above the dense model, below the pruned one, from the same noise.</p>")
        parts.append(_image(samples, "sample images, dense above pruned", "samples"))
    parts += ["<h2>How it was made</h2>", _settings(gates.info)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Pruning gates</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _costs(gates: Gates) -> str:
    report = gates_report(gates)
    found = report.savings
    rows = [
        (
            row.site,
            f"{row.kept} of {row.channels}",
            f"{1 - row.kept / row.channels:.1%}",
            f"{row.saved.parameters:,}",
            f"{row.saved.flops / 1e6:,.1f}",
        )
        for row in found.sites
    ]
    total = (
        "total",
        f"{found.kept} of {found.channels}",
        f"{found.sparsity:.1%}",
        f"{found.saved.parameters:,} ({found.parameter_share:.2%} of the U-Net)",
        f"{found.saved.flops / 1e6:,.1f} ({found.flop_share:.2%})",
    )
    head = ("site", "kept", "pruned", "parameters left out", "MFLOP left out")
    note = f"<p>Counted per pruned evaluation: {escape(report.counted_for())}.</p>"
    return _table(head, rows, total) + note


def _settings(info: Mapping[str, Any]) -> str:
    config: Mapping[str, Any] = info.get("config", {})
    rows = [(name, _text(value)) for name, value in {**info, **config}.items()]
    return _table(("", ""), [row for row in rows if row[0] not in ("config", "history")])


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], foot: Iterable[str] = ()) -> str:
    def cells(row: Iterable[str], tag: str = "td") -> str:
        shown = (escape(one_line(cell, LONGEST)) for cell in row)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    body = "\n".join(cells(row) for row in rows)
    foot = cells(foot) if foot else ""
    return (
        f"<table><thead>{cells(head, 'th')}</thead>\n<tbody>{body}</tbody>"
        f"<tfoot>{foot}</tfoot></table>"
    )


def _image(png: bytes, text: str, name: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{name}" alt="{escape(text)}" src="data:image/png;base64,{data}">'
