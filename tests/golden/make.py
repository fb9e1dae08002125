"""Write the golden set of this directory, a part of the full one.

python tests/golden/make.py FULL_SET
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
# It keeps two square images with seeds, one image for the multi-scale test, and the tensors computed from these.
KEPT = {
    "inputs": r"texts|(sq|aug)\.img_uint8|sq\.gt",
    "outputs": r"text_features.*|(eval_sq|train_sq|aug)\..*",
    "grads": r"train_sq\..*",
    "densecrf": r"image_uint8|probs|(voc|coco|train)_q(_t\d+)?",
}
WHOLE = r"texts|.*img_uint8|sq\.gt|image_uint8|probs|aug\.(pred|keys)"
ELEMENTS = 40
"""Of a tensor with more elements, about this number is kept."""


def part(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return a tensor as it is stored: itself, or evenly spaced elements. An odd step meets every row and column."""
    every = 1 if re.fullmatch(WHOLE, name) else tensor.numel() // ELEMENTS | 1
    return (name, tensor) if every == 1 else (f"{name}[::{every}]", tensor.flatten()[::every].contiguous())


def main(full: Path) -> None:
    for file in ("state.safetensors", "tokens.safetensors"):
        shutil.copyfile(full / file, HERE / file)
    for file, kept in KEPT.items():
        tensors = load_file(full / f"{file}.safetensors")
        parts = dict(part(name, tensor) for name, tensor in tensors.items() if re.fullmatch(kept, name))
        save_file(parts, HERE / f"{file}.safetensors")
    about = json.loads((full / "config.json").read_text())
    norms = about["info"]["train"]["train_sq"]["grad_l2_all"]
    norms = {name: norm and float(f"{norm:.9g}") for name, norm in norms.items()}
    sizes = about["config"] | {"train_variants": {"train_sq": about["config"]["train_variants"]["train_sq"]}}
    small = {"config": sizes, "info": {"train": {"train_sq": {"grad_l2_all": norms}}}}
    (HERE / "config.json").write_text(json.dumps(small, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
