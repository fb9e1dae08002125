"""Train a fully supervised segmentation network on the pseudo masks.

torchrun --nproc_per_node N -m weakclip.retrain --config configs/voc.yaml --config configs/retrain/segformer.yaml [--resume auto]
"""

from __future__ import annotations

from functools import partial

from weakclip import cli, train

main = partial(train.main, stage="retrain")

if __name__ == "__main__":
    cli.run(main)
