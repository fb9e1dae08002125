"""Print the paper's tables beside a run's figures, or one table with a row for each of several runs: weakclip report RUN ...

It reads the files that the stages wrote into RUN. A cell that was not run, or is not published, is "-".
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from weakclip import cli, labels, registry
from weakclip.evaluation.published import Cost, Method, Paper
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import ON_SEEDS, RunDir
from weakclip.runtime.tables import Table

NETWORKS = {name: entry.paper_name or name for name, entry in registry.NETWORKS.items()}
"""Folder in RUN/retrain -> backbone, as the paper's tables name it."""

SWEEPS = {"prompts": "number of prompts N", "temperatures": "initial alpha and beta"}

OURS, SPLITS = "this run", ("val", "test")


class Figures(NamedTuple):
    """Scores in percent; None where there is no value."""

    miou: float | None
    iou: dict[str, float | None]
    """IoU by class name."""


def read(path: Path) -> Figures:
    """Read the JSON that a validation or `weakclip.evaluate` wrote; a missing file gives no figures.

    Raises UserError naming a damaged file.
    """
    if not path.is_file():
        return Figures(None, {})
    try:
        found = json.loads(path.read_text())
        return Figures(_number(found["miou"]), {name: _number(value) for name, value in found.get("iou", {}).items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove it and run the command that wrote it again") from error


def _number(value: float | str | None) -> float | None:
    return None if value is None or math.isnan(float(value)) else float(value)


def report(run: Path) -> str:
    """Return all tables as text; those without a figure are left out.

    Raises UserError when `run` is not a run directory or a file in it is damaged.
    """
    classes = class_list(run)
    paper = Paper.of(classes)
    tables = [masks(run, paper), comparison(run, paper), per_class(run, paper, classes), *sweeps(run, paper), cost(run, paper)]
    heading = f"{run}, classes: {classes}" + ("" if paper.comparison else " (the paper has no figures for them)")
    return "\n\n".join([heading, *(str(table) for table in tables if table.has_figures())])


def compare(runs: Sequence[Path]) -> Table:
    """Return a table of mIoU with one row per run: CAMs, seeds and pseudo masks on the train set, then retrained networks on val.

    Raises UserError as `report` does.
    """
    rows: list[tuple[str | float | None, ...]] = []
    for run in runs:
        class_list(run)
        made = (read(RunDir(run).scores(what)).miou for what in ("cam", "seeds", "masks"))
        rows.append((str(run), *made, *(retrained(run, name, "val").miou for name in NETWORKS)))
        on_seeds = [retrained(run, name + ON_SEEDS, "val").miou for name in NETWORKS]
        if any(miou is not None for miou in on_seeds):
            rows.append((f"{run}, on the seeds", None, None, None, *on_seeds))
    header = ("run", "CAM", "seeds", "pseudo masks", *(f"{name} val" for name in NETWORKS))
    return Table("mIoU (%)", header, rows)


def class_list(run: Path) -> str:
    """Return `classes` of a run's config.yaml. Its other keys may be from an earlier version."""
    written = RunDir(run).config
    if not written.is_file():
        raise UserError(f"{run}: not a run directory, since it has no config.yaml; pass the value of `run` in training")
    try:
        return str(OmegaConf.to_container(OmegaConf.load(written))["classes"])  # type: ignore[call-overload,index]
    except Exception as error:  # PyYAML's and OmegaConf's errors have no common base class
        raise UserError(f"{written}: damaged ({' '.join(str(error).split())})") from error


def masks(run: Path, paper: Paper) -> Table:
    """Return the table up to the pseudo masks; the published figure is from the released checkpoints' page."""
    train = {"CAM, best single threshold": "cam", "seeds": "seeds", "pseudo masks": "masks"}
    ours = {f"train set: {name}": read(RunDir(run).scores(what)).miou for name, what in train.items()}
    ours["validation set: best weights, one scale, no CRF"] = read(RunDir(run).best).miou
    published = {} if paper.masks is None else {"train set: pseudo masks": paper.masks}
    return _beside("mIoU (%) before retraining", list(ours), {"paper": published}, {OURS: ours})


def comparison(run: Path, paper: Paper) -> Table:
    """Return the paper's comparison of methods on the data set, followed by this run's retrained networks."""
    ours = [
        Method(f"{OURS}, {name}{what}", backbone, "image", **{split: retrained(run, name + of, split).miou for split in SPLITS})
        for of, what in (("", ""), (ON_SEEDS, " on the seeds"))
        for name, backbone in NETWORKS.items()
        if not of or any(retrained(run, name + of, split).miou is not None for split in SPLITS)
    ]
    rows = [
        (row.method, row.backbone, row.supervision, *(getattr(row, split) for split in paper.splits))
        for row in (*paper.comparison, *ours)
    ]
    return Table("mIoU (%) of retrained networks", ("method", "backbone", "supervision", *paper.splits), rows)


def retrained(run: Path, network: str, split: str) -> Figures:
    """Read the figures of a network trained on the pseudo masks or, with ON_SEEDS after its name, on the seeds themselves."""
    return read(RunDir(run).retrained(network).scores(split))


def per_class(run: Path, paper: Paper, classes: str) -> Table:
    """Return the paper's IoU per class on VOC val and test, beside this run's. For pseudo masks only this run has figures."""
    columns: dict[str, Mapping[str, float | None]] = {}
    names = labels.CLASS_SETS.get(classes, ())
    for split in paper.splits:
        for method, iou in paper.classes.get(split, {}).items():
            columns[f"{method} {split}"] = dict(zip(names, iou, strict=True))
        columns[f"{OURS} {split}"] = retrained(run, "resnet38", split).iou
    columns["pseudo masks"] = read(RunDir(run).scores("masks")).iou
    names = names or tuple(dict.fromkeys(name for column in columns.values() for name in column))
    return _beside("IoU (%) per class: ResNet38, and this run's pseudo masks of the train set", names, {}, columns)


def sweeps(run: Path, paper: Paper) -> list[Table]:
    """Return the paper's ablations on VOC and all other sweeps in RUN/sweeps, one table per sweep."""
    folder = RunDir(run).sweeps
    return [_sweep(folder / name, paper.sweeps.get(name, {})) for name in dict.fromkeys([*paper.sweeps, *_folders(folder)])]


def _sweep(folder: Path, published: Mapping[str, float]) -> Table:
    tasks = list(dict.fromkeys([*published, *_folders(folder)]))
    ours = {
        f"{OURS}, validation": {task: read(RunDir(folder / task).best).miou for task in tasks},
        f"{OURS}, pseudo masks": {task: read(RunDir(folder / task).scores("masks")).miou for task in tasks},
    }
    title = f"mIoU (%) by {SWEEPS.get(folder.name, folder.name)}; validation: best weights, one scale, no CRF; masks: train set"
    return _beside(title, tasks, {"paper": published}, ours)


def _folders(parent: Path) -> list[str]:
    """List folder names, the shorter ones first: 8 comes before 16, and 0.1 before 0.01."""
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return sorted(names, key=lambda name: (len(name), name))


def cost(run: Path, paper: Paper) -> Table:
    """Return the table of parameters, speed and memory in training."""
    rows = [
        (row.method, row.trainable, row.total, _percent(row.trainable, row.total), row.images_per_second, row.memory_gib)
        for row in (*paper.cost, measured_cost(RunDir(run).metrics))
    ]
    header = ("", "trainable (M)", "of all (M)", "%", "images/s", "GiB")
    return Table("Training: parameters, median speed of all devices together, peak memory of a device", header, rows)


def measured_cost(path: Path) -> Cost:
    """Return the parameters, median images per second and peak memory from a run's metrics.jsonl.

    Raises UserError naming a damaged line. An incomplete last line is ignored.
    """
    values: dict[str, list[float]] = defaultdict(list)
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            for name, value in json.loads(line).items() if line.endswith("\n") else ():
                values[name].append(float(value))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error!r}); remove that line") from error
    trainable, total = (values[f"parameters/{name}"] for name in ("trainable", "total"))
    speed, memory = values["images_per_second"], values["memory_gib"]
    return Cost(
        OURS,
        trainable[0] / 1e6 if trainable else None,
        total[0] / 1e6 if total else None,
        statistics.median(speed) if speed else None,
        max(memory, default=None),
    )


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else 100 * part / whole


def _beside(
    title: str,
    names: Sequence[str],
    published: Mapping[str, Mapping[str, float]],
    ours: Mapping[str, Mapping[str, float | None]],
) -> Table:
    """Return a table with one row per name; an empty published column is left out."""
    columns = {**{name: column for name, column in published.items() if column}, **ours}
    return Table(title, ("", *columns), [(name, *(column.get(name) for column in columns.values())) for name in names])


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip report", description="The paper's tables beside a run's figures.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, such as runs/voc; several: one table")
    runs = parser.parse_args(arguments).runs
    print(compare(runs) if len(runs) > 1 else report(runs[0]))


if __name__ == "__main__":
    cli.run(main)
