"""SegFormer, the "hybrid ViT" of the paper's tables: a Mix Transformer and an all-MLP decoder, both from `transformers`.

Xie et al. (NeurIPS 2021, arXiv 2105.15203), table 6 of the appendix; released code: NVlabs/SegFormer.

Recipe: WeakCLIP does not publish the one of its retraining. SegFormer's own on ADE20K (local_configs/segformer/B2): AdamW, betas
0.9 and 0.999, weight decay 0.01 (none on norms; here none on biases either), learning rate 6e-5, the head's 10 x, linear warm-up
over 1,500 steps from 1e-6 x, then linearly to 0 (poly, power 1), batch 16 (8 GPUs x 2), 160,000 steps; image (2048, 512) times
0.5..2, crop 512 with no class above 75 %, flip, photometric distortion. Test: short side 512 to multiples of 32, whole image.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from weakclip.checkpoints import state_dict
from weakclip.networks.base import OTHER_BACKBONE, Network, read_backbone
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()

from transformers import SegformerConfig, SegformerForSemanticSegmentation

# Widths and layers of the four stages, and the decoder's width.
_SMALL, _LARGE = (32, 64, 160, 256), (64, 128, 320, 512)
_SIZES = {
    "b0": (_SMALL, (2, 2, 2, 2), 256),
    "b1": (_LARGE, (2, 2, 2, 2), 256),
    "b2": (_LARGE, (3, 4, 6, 3), 768),
    "b3": (_LARGE, (3, 4, 18, 3), 768),
    "b4": (_LARGE, (3, 8, 27, 3), 768),
    "b5": (_LARGE, (3, 6, 40, 3), 768),
}

# Names in files -> names in transformers 5, which renamed its modules while all files, including its own, keep the old names.
_RENAMED = (
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.patch_embeddings."),
    (r"^encoder\.block\.(\d)\.", r"stages.\1.blocks."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.layer_norm."),
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.dense1\.", ".mlp.fc1."),
    (r"\.mlp\.dense2\.", ".mlp.fc2."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
)


class SegFormer(Network):
    """SegFormer with logits at stride 4, rounded up. Sides need not be multiples of 32: the convolutions take any size."""

    least_side = 32  # the first stage's keys are reduced by convolutions of 8 x 8 positions of stride 4

    def __init__(self, num_classes: int, backbone: str = "b2") -> None:
        """backbone: "b0" to "b5"."""
        super().__init__()
        widths, layers, decoder_width = _SIZES[backbone]
        self.network = SegformerForSemanticSegmentation(
            SegformerConfig(
                num_labels=num_classes,
                hidden_sizes=list(widths),
                depths=list(layers),
                decoder_hidden_size=decoder_width,
                num_attention_heads=[1, 2, 5, 8],
                sr_ratios=[8, 4, 2, 1],
                mlp_ratios=[4, 4, 4, 4],
                drop_path_rate=0.1,
                classifier_dropout_prob=0.1,
            )
        )

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.network(images_B3HW).logits

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.network.decode_head.parameters())

    def load_pretrained(self, path: Path) -> None:
        """Load a classifying Mix Transformer as transformers saves it (nvidia/mit-b2): the file, or the directory with it.

        Raises ConfigError if it does not fit the encoder.
        """
        encoder = self.network.segformer
        found = {name.removeprefix("segformer."): tensor for name, tensor in read_backbone(path, "classifier.").items()}
        if hasattr(encoder, "stages"):
            found = {_renamed(name): tensor for name, tensor in found.items()}
        state_dict.load_into(encoder, found, f"pretrained: {path}", OTHER_BACKBONE)


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name
