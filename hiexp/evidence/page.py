"""The files of a finished, or half finished, study: summary.json, results.md, two pictures and one HTML page."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from hiexp.evidence.pictures import curves_png, endpoints_png
from hiexp.evidence.results import collect
from hiexp.evidence.tables import markdown
from hiexp.evidence.verdict import as_text, verdict
from hiexp.io import atomic_write
from hiexp.report.markup import esc

_PICTURES = {"curves.png": curves_png, "endpoints.png": endpoints_png}


def write_results(out: str | Path, to: str | Path | None = None) -> Path:
    """Write everything into ``to`` (default: ``out`` itself) from what is finished in ``out``; returns results.md.

    Raises:
        DataError: there is no study, or nothing in it is finished.
    """
    summary = collect(out)
    folder = Path(to) if to is not None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "summary.json", json.dumps(_rounded(summary)) + "\n")
    for name, draw in _PICTURES.items():
        draw(summary, folder / name)
    said, tables = verdict(summary), markdown(summary)
    seeds = ", ".join(map(str, summary["seeds"]))
    head = f"# Evidence in miniature\n\nWritten by `hiexp evidence` from its own numbers; seeds {seeds}.\n\n"
    pictures = "".join(f"![{name.partition('.')[0]}]({name})\n\n" for name in _PICTURES)
    atomic_write(folder / "results.md", f"{head}{as_text(said)}\n{pictures}{tables}")
    atomic_write(folder / "results.html", _html(folder, said, tables))
    return folder / "results.md"


def _rounded(value: Any) -> Any:
    """``value`` with numbers of six significant digits: the file is kept beside code."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _html(folder: Path, said: list[tuple[str, list[str]]], tables: str) -> str:
    style = resources.files("hiexp.report").joinpath("style.css").read_text(encoding="utf-8")
    sentences = "".join(
        f"<h2>{esc(title)}</h2><div class='card'><ul>{''.join(f'<li>{esc(one)}</li>' for one in found)}</ul></div>"
        for title, found in said
    )
    pictures = "".join(
        f"<figure class='card'><img alt='{name}' style='width:100%' src='data:image/png;base64,"
        f"{base64.b64encode((folder / name).read_bytes()).decode()}'></figure>"
        for name in _PICTURES
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>hiexp evidence</title><style>\n{style}</style></head>\n"
        f"<body><main><h1>Evidence in miniature</h1>{sentences}{pictures}{_tables_html(tables)}</main></body></html>\n"
    )


def _tables_html(tables: str) -> str:
    """The Markdown tables as HTML: headings, table rows and notes are all there is in them."""
    found: list[str] = []
    for block in filter(None, (block.strip() for block in tables.split("\n\n"))):
        if block.startswith("## "):
            found.append(f"<h2>{esc(block[3:])}</h2>")
        elif block.startswith("|"):
            head, _, *body = (line.strip("|").split("|") for line in block.splitlines())
            titles = "".join(f"<th>{esc(cell.strip())}</th>" for cell in head)
            rows = "".join(f"<tr>{''.join(f'<td>{esc(cell.strip())}</td>' for cell in line)}</tr>" for line in body)
            found.append(
                f"<div class='card scroll'><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>"
            )
        else:
            found.append(f"<p class='note'>{esc(block)}</p>")
    return "".join(found)
