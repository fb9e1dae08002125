"""The networks, CAM sources, losses and data sets that a recipe can name. One line here makes each available everywhere.

Entries hold import paths, "package.module:attribute", which `load` imports only when they are used, so a login node can check a
recipe without importing torch. CONTRIBUTING.md shows by example how to add one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple


def load(path: str) -> Any:
    """Import and return what `path` names, such as "weakclip.networks.resnet38:ResNet38"; without ":" the module itself."""
    name, _, attribute = path.partition(":")
    module = import_module(name)
    return getattr(module, attribute) if attribute else module


class NetworkEntry(NamedTuple):
    """A segmentation network that can be retrained on pseudo masks: `retrain.network`."""

    network: str
    """Import path of the subclass of weakclip.networks.base.Network."""
    published: str
    """Name of the backbone in the paper's tables: the default of `retrain.backbone`."""
    backbones: Mapping[str, Mapping[str, Any]]
    """Backbone name -> keyword arguments of the class."""
    sized: bool = False
    """Whether the class takes `image_size`, the side of the training crops, because its position embedding has that size."""
    paper_name: str | None = None
    """Name of the network in the paper's tables."""


_DEITS = [f"deit_{size}{distilled}_patch16_224" for distilled in ("", "_distilled") for size in ("tiny", "small", "base")]

NETWORKS = {
    "resnet38": NetworkEntry(
        "weakclip.networks.resnet38:ResNet38", "wide", {"wide": {"width": 64}, "narrow": {"width": 8}}, paper_name="ResNet38"
    ),
    "segmenter": NetworkEntry(
        "weakclip.networks.segmenter:Segmenter",
        "deit_small_patch16_224",
        {name: {"backbone": name} for name in _DEITS},
        sized=True,
        paper_name="DeiT-S",
    ),
    "segformer": NetworkEntry(
        "weakclip.networks.segformer:SegFormer",
        "b2",
        {f"b{size}": {"backbone": f"b{size}"} for size in range(6)},
        paper_name="MiT-B2",
    ),
}


class CamSource(NamedTuple):
    """A method that makes CAMs from image labels: `cam.source`."""

    provenance: str
    """Import path of a function: config -> dict for JSON of what decides the CAMs. It must be light: it runs on login nodes."""
    maker: str
    """Import path of a function: (config, labelled index) -> (function: sample -> Cam, dict of what it determined, for JSON)."""
    classifier: bool = False
    """Whether the stage `classify` first trains a classifier for it."""


CAM_SOURCES = {
    "clip": CamSource("weakclip.cams.provenance:clip_es", "weakclip.cams.clip_es:maker"),
    "mctformer": CamSource("weakclip.cams.provenance:mctformer", "weakclip.cams.mctformer:maker", classifier=True),
}

LOSSES = {
    "seeding": "weakclip.models.losses:seeding",
    "boundary": "weakclip.models.losses:boundary",
    "auxiliary": "weakclip.models.losses:auxiliary",
}
"""Losses that `loss.weights` can name -> import paths of functions of weakclip.models.losses.LossInputs that return a scalar."""


class DataSet(NamedTuple):
    """A layout of images and labels on disk from which shards are built: `data.build.source`."""

    items: str
    """Import path of a function: (BuildConfig, class names of the new set) -> weakclip.datasets.items.Listing."""
    description: str
    """Short text for --help."""
    options: Mapping[str, str]
    """Field of BuildConfig -> help text of its command-line option. A field that is not listed must stay unset."""
    required: tuple[str, ...]
    """Options that must be given."""
    classes: str | None = None
    """Class list of the new set where the command line names none; None: it must."""


DATA_SETS = {
    "coco": DataSet(
        "weakclip.datasets.coco:items",
        "images with annotations in COCO's format, such as COCO 2014 or 2017",
        {
            "images": "directory of the split's images",
            "annotations": "an instances_*.json, whose categories are matched with the class list by name",
            "masks": "add the ground-truth masks, for evaluation",
        },
        required=("images", "annotations"),
        classes="coco",
    ),
    "voc": DataSet(
        "weakclip.datasets.voc:items",
        "PASCAL VOC 2012 in the layout of its development kit",
        {
            "devkit": "the directory VOCdevkit/VOC2012",
            "split": "trainaug, train, val or test (in ImageSets/Segmentation), or a file that lists image names",
            "labels": "cls_labels.npy, {name: 20 zeros and ones}, for images without XML",
            "masks": "add the ground-truth masks of SegmentationClass or SegmentationClassAug",
        },
        required=("devkit", "split"),
        classes="voc",
    ),
    "folder": DataSet(
        "weakclip.datasets.folder:items",
        "a folder of JPEG, PNG and WebP images",
        {
            "images": "directory of the images",
            "labels": "CSV with the columns file,labels, or with a column of 0 and 1 for each class",
            "recursive": "images, masks and CAMs may lie in subfolders",
            "mask_dir": "directory of ground-truth masks, NAME.png, for evaluation",
        },
        required=("images",),
    ),
}
