from __future__ import annotations

import copy
import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[1]

# The tests' tensors are tiny, and torch's threads would block each other where several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

TINY_RECIPE = """
precision: fp32
classes: {classes}
data: {{scale: [128, 64], workers: 0, shuffle_window: 2}}
augment: {{crop: 64}}
clip: {{model: null, pretrained: {clip}, image_size: 64, drop_path: 0.0}}
matching: {{width: 16, heads: 2}}
decoder: {{fpn_channels: 24, head_channels: 24}}
loss: {{grid: [16, 16]}}
train: {{steps: 20, batch: 2, deepspeed: {repo}/configs/deepspeed/zero0.json}}
pseudo: {{scales: [1.0], window: 64, stride: 42, processes: 0}}
"""

TINY_NAMES = ("background", "cat", "dog", "cow")


OPTIONAL = ("slurm", "golden", "coco")
"""What a machine may lack for some tests, which are then skipped; where WEAKCLIP_TEST_REQUIRE names it, they fail."""


def required() -> set[str]:
    """Return what WEAKCLIP_TEST_REQUIRE names, as in "slurm,golden". Raises UsageError when one of it is unknown."""
    names = set(filter(None, os.environ.get("WEAKCLIP_TEST_REQUIRE", "").split(",")))
    if unknown := names - set(OPTIONAL):
        raise pytest.UsageError(f"WEAKCLIP_TEST_REQUIRE: unknown {', '.join(sorted(unknown))}; known: {', '.join(OPTIONAL)}")
    return names


def pytest_configure() -> None:
    required()


def skip_or_fail(optional: str, reason: str) -> NoReturn:
    """Skip the test, which lacks one of OPTIONAL; fail where that is required."""
    if optional in required():
        pytest.fail(f"{reason}; WEAKCLIP_TEST_REQUIRE names {optional}", pytrace=False)
    pytest.skip(reason)


def beside_the_repository(path: str, optional: str) -> Path:
    if not (REPO.parent / path).is_dir():
        skip_or_fail(optional, f"no {path} beside the repository")
    return REPO.parent / path


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """140 real COCO images in the 2014 layout, when they lie beside the repository."""
    return beside_the_repository("shared/data/coco_mini", "coco")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs and outputs of the released implementation at a small size, when they lie beside the repository."""
    return beside_the_repository("shared/golden", "golden")


@pytest.fixture(scope="session")
def golden_part() -> Path:
    """A part of these, which every clone has (tests/golden/README.md)."""
    return REPO / "tests/golden"


@pytest.fixture(scope="session")
def make_tiny_clip() -> Callable[..., Any]:
    """A seeded random open_clip.CLIP of a few thousand weights; keyword arguments change its vision part."""
    from weakclip.models.clip import open_clip  # weakclip.models.clip prepares the import
    from weakclip.runtime.torchvision_ops import torch

    def make(**vision: Any) -> Any:
        torch.manual_seed(7)
        architecture = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | vision}
        return open_clip.CLIP(**architecture).eval()

    return make


@pytest.fixture(scope="session")
def save_tiny_clip(make_tiny_clip) -> Callable[..., Path]:
    """Writes such a CLIP as a directory of open_clip_config.json and weights, with the token rows of all class names alone."""
    from safetensors.torch import save_file

    from weakclip.labels import CLASS_SETS
    from weakclip.models.clip import tokenize

    def save(folder: Path, **vision: Any) -> Path:
        state = {name: tensor.contiguous() for name, tensor in make_tiny_clip(**vision).state_dict().items()}
        ids = tokenize(sorted({name for names in CLASS_SETS.values() for name in names}), 5).unique()
        state["token_embedding.rows"] = state.pop("token_embedding.weight")[ids]
        state["token_embedding.row_ids"] = ids
        architecture = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | vision}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
        save_file(state, folder / "open_clip_model.safetensors")
        return folder

    return save


@pytest.fixture(scope="session")
def openai_archive() -> Callable[..., None]:
    """`write(clip, path)`: TorchScript of fp16 weights under the state dict's names, with three numbers beside them."""
    import torch

    def write(clip: Any, path: Path) -> None:
        def tree(entries: dict[str, Any]) -> torch.nn.Module:
            module, below = torch.nn.Module(), {}
            for name, tensor in entries.items():
                head, _, rest = name.partition(".")
                if rest:
                    below.setdefault(head, {})[rest] = tensor
                else:
                    module.register_buffer(head, tensor)
            for head, inner in below.items():
                module.add_module(head, tree(inner))
            return module

        state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
        numbers = {"input_resolution": 64, "context_length": 16, "vocab_size": 49408}
        root = tree(state | {name: torch.tensor(value) for name, value in numbers.items()})
        torch.jit.script(root).save(str(path))

    return write


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, save_tiny_clip) -> Path:
    """The directory of a tiny random CLIP."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, tiny_clip) -> Path:
    """A YAML recipe of four classes for the tiny CLIP, crops and windows of 64 pixels, fp32, no loader process."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "names.txt").write_text("\n".join(TINY_NAMES))
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(classes=folder / "names.txt", clip=tiny_clip, repo=REPO))
    return folder / "tiny.yaml"


@pytest.fixture
def tiny_config(tiny_recipe, tmp_path) -> Callable[..., Any]:
    """The tiny recipe as a Config, changed by overrides such as "train.batch=4"; its run lies in tmp_path."""
    from weakclip.recipe import load

    return lambda *overrides: load(tiny_recipe, [f"run={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="session")
def tiny_model(tiny_recipe) -> Callable[..., Any]:
    """A seeded random WeakCLIP of the tiny recipe, changed by overrides, in evaluation mode."""
    from weakclip.labels import class_names
    from weakclip.models.weakclip import WeakCLIP
    from weakclip.recipe import load
    from weakclip.runtime.torchvision_ops import torch

    @functools.cache
    def build(*overrides: str) -> WeakCLIP:
        config = load(tiny_recipe, overrides)
        torch.manual_seed(3)
        return WeakCLIP(config, class_names(config.classes)).eval()

    return lambda *overrides: copy.deepcopy(build(*overrides))


@pytest.fixture
def weights(tiny_model, tmp_path) -> Path:
    """last.safetensors of the run that `tiny_config` means, the tiny model's."""
    from weakclip.checkpoints import weights as stored

    path = tmp_path / "run/weights/last.safetensors"
    stored.save(tiny_model(), path, step=3)
    return path


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Any]:
    """Builds a set of TINY_NAMES: `make(out, count, per_shard, H, W, **changes)`, where changes replace a sample's fields.

    Image n is of random pixels with `n` in its first one; its left half is class 1 in mask, seed and CAM, the rest background.
    """
    from weakclip.data.sample import Cam, Sample
    from weakclip.datasets.writing import build_shards

    def make(
        out: Path, count: int = 7, per_shard: int = 3, H: int = 48, W: int = 64, names: Sequence[str] = (), **changes: Any
    ) -> Any:
        def load(number: int) -> Sample:
            image_HW3 = np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)
            image_HW3[0, 0] = number
            mask_HW = np.zeros((H, W), np.uint8)
            mask_HW[:, : W // 2] = 1
            cam = Cam((1,), (200 * mask_HW)[None], 1.0)
            fields = {"image": png(image_HW3), "image_ext": "png", "classes": (1,), "cam": cam}
            fields |= {"seed": png(mask_HW), "mask": png(mask_HW), **changes}
            name = names[number] if names else f"image_{number}"
            return Sample(name, height=H, width=W, source="made up", **fields)

        return build_shards(range(count), load, out, TINY_NAMES, samples_per_shard=per_shard)

    return make


@pytest.fixture(scope="session")
def jpeg_of() -> Callable[[np.ndarray], bytes]:
    def encode(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG")
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def png_of() -> Callable[[np.ndarray], bytes]:
    return png
