"""The published figures of WeakCLIP's paper (Zhu et al., IJCV 133:1085-1105, 2025), read from assets/paper_tables.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

TABLES = Path(__file__).parents[1] / "assets" / "paper_tables.json"


@dataclass(frozen=True)
class Method:
    """One row of the tables that compare published methods; mIoU in %, None where none is published."""

    method: str
    backbone: str
    supervision: str
    val: float | None
    test: float | None = None


@dataclass(frozen=True)
class Cost:
    """One row of the table of costs, for VOC's 21 classes and on hardware that the paper does not name."""

    method: str
    trainable: float | None
    """Trainable parameters in millions."""
    total: float | None
    """All parameters in millions, frozen ones included."""
    images_per_second: float | None
    """Speed in training."""
    memory_gib: float | None


@dataclass(frozen=True)
class Paper:
    """The published figures for one data set; empty for any other. IoU and mIoU in %."""

    splits: tuple[str, ...] = ("val", "test")
    """Splits on which retrained networks are scored."""
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
        """Return the figures for a class list as in `Config.classes`; the paper has those for voc and coco."""
        tables = json.loads(TABLES.read_text())
        if classes not in tables["data sets"]:
            return cls()
        found = tables["data sets"][classes]
        comparison = tuple(Method(**row) for row in found.pop("comparison"))
        splits = tuple(split for split in cls.splits if any(getattr(row, split) is not None for row in comparison))
        return cls(splits, comparison=comparison, cost=tuple(Cost(**row) for row in tables["cost"]), **found)
