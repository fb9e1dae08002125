"""The figures that WeakCLIP's paper publishes (Zhu et al., IJCV 133:1085-1105, 2025): assets/paper_tables.json, typed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

TABLES = Path(__file__).parents[1] / "assets" / "paper_tables.json"


@dataclass(frozen=True)
class Method:
    """A row of the tables that compare published methods; mIoU in %, None where none is published."""

    method: str
    backbone: str
    supervision: str
    val: float | None
    test: float | None = None


@dataclass(frozen=True)
class Cost:
    """A row of the table of costs, with VOC's 21 classes and on hardware that the paper does not name."""

    method: str
    trainable: float | None
    """Parameters, millions."""
    total: float | None
    """Parameters, millions, with the frozen ones."""
    images_per_second: float | None
    """In training."""
    memory_gib: float | None


@dataclass(frozen=True)
class Paper:
    """What is published for one data set; empty for any other. IoU and mIoU in %."""

    splits: tuple[str, ...] = ("val", "test")
    """Where retrained networks are scored."""
    masks: float | None = None
    """mIoU of the pseudo masks on the train set, from the released checkpoints' page."""
    comparison: tuple[Method, ...] = ()
    classes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Split -> method -> IoU of each class, in the order of weakclip.labels; networks are ResNet38."""
    sweeps: dict[str, dict[str, float]] = field(default_factory=dict)
    """Ablation -> value -> mIoU."""
    cost: tuple[Cost, ...] = ()

    @classmethod
    def of(cls, classes: str) -> Paper:
        """The figures for the class list `classes`, as `Config.classes` says it: the paper has those for voc and coco."""
        tables = json.loads(TABLES.read_text())
        if classes not in tables["data sets"]:
            return cls()
        found = tables["data sets"][classes]
        comparison = tuple(Method(**row) for row in found.pop("comparison"))
        splits = tuple(split for split in cls.splits if any(getattr(row, split) is not None for row in comparison))
        return cls(splits, comparison=comparison, cost=tuple(Cost(**row) for row in tables["cost"]), **found)
