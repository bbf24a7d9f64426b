"""The report as Markdown, as HTML that needs no server, and as JSON."""

import base64
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..data.atomic_write import atomic_write
from ..data.markdown_table import markdown_table
from ..data.text_files import json_text
from ..plots import plot_by_row
from ..publishing.checksums import SUMS, write_checksums
from .measures import MIN_TURNS, MOVED, PERMUTATIONS

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:14px}td{padding:.2rem .6rem;border-bottom:1px solid #ccc;"
    "text-align:right;white-space:nowrap}td:first-child{text-align:left}"
    "tr:first-child td{font-weight:bold;white-space:normal}"
)
MOVED_MEANS = f"Moved: the share of turns whose value changes by more than {MOVED} on a scale from 0 to 1."
CARD_BEGIN, CARD_END = "<!-- mamba-ema report -->", "<!-- end of mamba-ema report -->"
LEAK = 0.2  # a correlation of a label with the recording above which a model can learn the recording


def write_report(folder: Path, content: dict[str, Any]) -> Path:
    """Write report.html, which is returned, report.md, report.json, and the pictures beside them.

    Args:
        content: `title`, `command`, `labels`; `overall`, `groups` (by column), `changes` (by condition) and
            `correlations`, as the functions of `measures` give them; `no_speech`, predictions by sound.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overall, changes = content["overall"], content["changes"]
    parts = [f"# {content['title']}", f"Made by `{content['command']}`.", "## Overall"]
    parts.append(
        markdown_table(
            ["label", "turns", "CCC (95 % over conversations)"], ([r["label"], r["turns"], _ccc(r)] for r in overall)
        )
    )
    parts += ["## Does the recording give the labels away?", *_correlations(content["correlations"])]
    taken = {"report_changes.png"}
    for column, found in content["groups"].items():
        name = f"report_{re.sub(r'[^a-z0-9]', '_', column.lower())}.png"
        while name in taken:
            name = name.replace(".png", "_.png")
        taken.add(name)
        plot_by_row(found["groups"], "ccc", f"CCC by {column}", origin=False).savefig(folder / name, dpi=110)
        parts += [f"## By {column}", f"![CCC by {column}]({name})", *_groups(found)]
    plot_by_row(changes, "difference", "change of CCC", origin=True).savefig(folder / "report_changes.png", dpi=110)
    parts += ["## Worse recordings", "![change of CCC](report_changes.png)", _changes(changes)]
    parts.append(MOVED_MEANS)
    sounds = ([name, *(f"{value:.3f}" for value in values.values())] for name, values in content["no_speech"].items())
    parts += ["## What is no speech", markdown_table(["sound", *content["labels"]], sounds)]
    parts.append("A model answers everything: its values for these say nothing, and show where it rests.")
    html = '<!doctype html><html lang="en"><meta charset="utf-8">'
    html += f"<title>{escape(content['title'])}</title><style>{STYLE}</style>"
    html += "\n".join(_html(part, folder) for part in parts)
    for kind, text in (("md", "\n\n".join(parts)), ("html", html), ("json", json_text(content))):
        atomic_write(folder / f"report.{kind}", f"{text}\n")
    return folder / "report.html"


def add_to_card(folder: Path, content: dict[str, Any]) -> None:
    """Put groups and worse recordings into README.md in the folder of a saved model, in the place of those of an
    earlier report; its checksums, if there are any, are written anew. The content is that of [`write_report`]."""
    parts = [CARD_BEGIN, "## Behaviour", f"{content['title']}, made by `{content['command']}`."]
    for column, found in content["groups"].items():
        parts += [f"### By {column}", *_groups(found)]
    parts += ["### Worse recordings", _changes(content["changes"]), MOVED_MEANS, CARD_END]
    section, card = "\n\n".join(parts), folder / "README.md"
    before, begin, rest = card.read_text(encoding="utf-8").partition(CARD_BEGIN)
    after = rest.partition(CARD_END)[2] if begin else ""
    atomic_write(card, f"{before.rstrip()}\n\n{section}\n{after}")
    if (folder / SUMS).is_file():
        write_checksums(folder)


def _html(part: str, folder: Path) -> str:
    """One part of the page: a heading, a picture, which becomes part of the file, a table, or a paragraph."""
    if part.startswith("!"):
        picture = base64.b64encode((folder / part[part.rindex("(") + 1 : -1]).read_bytes()).decode()
        return f'<img alt="" src="data:image/png;base64,{picture}">'
    if part.startswith("|"):
        rows = (line.strip("| ").split(" | ") for place, line in enumerate(part.splitlines()) if place != 1)
        return f"<table>{''.join(f'<tr>{_cells(row)}</tr>' for row in rows)}</table>"
    level = len(part) - len(part.lstrip("#"))
    tag = f"h{level}" if level else "p"
    text = re.sub("`(.+?)`", r"<code>\1</code>", escape(part[level:].strip()))
    return f"<{tag}>{text}</{tag}>"


def _cells(row: Iterable[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _ccc(row: dict[str, Any], name: str = "ccc") -> str:
    if name not in row:
        return "-"  # of too few turns
    ends = "" if math.isnan(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"  # not of one conversation
    return f"{row[name]:.3f}{ends}"


def _correlations(rows: Sequence[dict[str, Any]]) -> list[str]:
    facts = [name for name in rows[0] if name not in ("label", "of")]
    cells = ([f"{row['label']}: {row['of']}", *(f"{row[fact]:+.2f}" for fact in facts)] for row in rows)
    labels = [(row, fact) for row in rows for fact in facts if row["of"] == "label" and abs(row[fact]) > LEAK]
    leaks = "; ".join(f"{row['label']} goes with {fact} ({row[fact]:+.2f})" for row, fact in labels)
    verdict = f"{leaks}: a model can score by measuring these." if leaks else f"No label does by more than {LEAK}."
    return [markdown_table(["correlation of", *facts], cells), verdict]


def _groups(found: dict[str, Any]) -> list[str]:
    rows = []
    for group, cells in found["groups"].items():
        for cell in cells:
            values = [f"{cell['bias']:+.3f}", f"{cell['spread']:.2f}"] if "ccc" in cell else ["-", "-"]
            rows.append([f"{cell['label']}: {group}", cell["turns"], _ccc(cell), *values])
    gaps = ", ".join(f"{gap['label']} {gap['gap']:.3f} (p {gap['p']:.3f})" for gap in found["gaps"])
    remarks = (
        f"Gap between the best and the worst group: {gaps or 'none can be measured'}. p: the share of {PERMUTATIONS} "
        f"random assignments to the groups with as large a gap. Bias: mean prediction minus mean label; spread: "
        f"deviation of predictions over that of labels. Groups under {MIN_TURNS} turns are counted, not measured."
    )
    return [markdown_table(["group", "turns", "CCC", "bias", "spread"], rows), remarks]


def _changes(changes: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for condition, cells in changes.items():
        rows.append([condition])
        for cell in cells:
            rows[-1] += [
                f"{cell['ccc']:.3f}",
                _ccc(cell, "difference"),
                f"{cell['shift']:+.3f}",
                f"{cell['moved']:.0%}",
            ]
    labels = [cell["label"] for cell in next(iter(changes.values()))]
    names = [f"{label}: {name}" for label in labels for name in ("CCC", "change", "mean shift", "moved")]
    return markdown_table(["condition", *names], rows)
