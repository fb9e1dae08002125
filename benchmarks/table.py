"""Write docs/performance.md: its tables are made of the JSON files of benchmarks/step.py, mask.py and gpu.py.

    python benchmarks/table.py docs/benchmarks/*.json

Between the two marks in the page everything is replaced; the text around them is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- begin: python benchmarks/table.py docs/benchmarks/*.json -->\n", "<!-- end -->\n"
COLUMNS = {
    "ours, images/s": lambda step: step["ours"]["images_per_s"],
    "released order, images/s": lambda step: step["released"]["images_per_s"],
    "ratio": lambda step: step["ratio"],
    "GiB": lambda step: step["ours"]["peak_gib"],
    "GiB, released": lambda step: step["released"]["peak_gib"],
    "MFU": lambda step: step.get("mfu", "-"),
}


def measurements(file: Path) -> dict[str, dict[str, Any]]:
    """Return the measurements in a file, by name."""
    found = json.loads(file.read_text())
    return {file.stem.replace("_", " "): found} if "hardware" in found else found


def markdown(files: Sequence[Path]) -> str:
    """Return a table of all steps, one of the parts of each step, and one of all masks."""
    named = [(name, found) for file in files for name, found in measurements(file).items()]
    steps = [(name, found) for name, found in named if "ratio" in found]
    masks = [(name, found) for name, found in named if "network_ms" in found]
    lines = [row("training step", *COLUMNS, "machine"), row(*["---"] * (len(COLUMNS) + 2))]
    for name, step in steps:
        shape = f"{name}: batch {step['batch']}, {step['crop']} x {step['crop']}, K = {step['classes']}"
        lines.append(row(shape, *(column(step) for column in COLUMNS.values()), machine(step)))
    for name, step in steps:
        parts = {which: step[which]["parts_ms"] for which in ("ours", "released")}
        lines += ["", f"{name}, by part (ms), measured in separate steps; ours without DeepSpeed and the optimizer:", ""]
        lines += [row("part", "ours", "released order"), row("---", "---", "---")]
        every = dict.fromkeys([*parts["ours"], *parts["released"]])
        lines += [row(part, parts["ours"].get(part, "-"), parts["released"].get(part, "-")) for part in every]
    lines += [f"\n{name}: failed, {found['failed']}" for name, found in named if "failed" in found]
    if not masks:
        return "\n".join(lines) + "\n"
    lines += ["", row("mask of 500 x 375 pixels", "eager, ms", "compiled, ms", "CRF on one core, ms", "GiB", "machine")]
    lines.append(row(*["---"] * 6))
    for name, mask in masks:
        network = [mask["network_ms"].get(way, "-") for way in ("eager", "compiled")]
        lines.append(row(f"{name}: K = {mask['classes']}", *network, mask["crf_ms"], mask["peak_gib"], machine(mask)))
    return "\n".join(lines) + "\n"


def machine(found: dict[str, Any]) -> str:
    return f"{found['hardware']}, torch {found['torch']}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + markdown([Path(name) for name in sys.argv[1:]]) + END + after)


if __name__ == "__main__":
    main()
