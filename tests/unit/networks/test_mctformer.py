"""MCTformer: its tokens and heads, pretrained weights, and maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from weakclip.cams import maps
from weakclip.cams import mctformer as cam_mctformer
from weakclip.config import ConfigError
from weakclip.data.photometric import IMAGENET
from weakclip.models.attention import attention_weights
from weakclip.models.positions import resize_positions
from weakclip.networks import mctformer
from weakclip.networks.mctformer import Logits, MCTformer, timm

TINY = "test_vit"
"""timm's: six blocks of width 64, patches of 16 pixels."""
COLOURS = [(220, 30, 30), (30, 200, 30), (40, 40, 230)]
OPTIONS = {"scales": [1.0], "flip": False, "attention_blocks": 3, "affinity_steps": 1, "scale": [128, 64], "size": (16, 24)}


def tiny(**options) -> MCTformer:
    torch.manual_seed(3)
    return MCTformer(4, TINY, **{"image_size": 64} | options).eval()


@pytest.fixture(scope="module")
def network() -> MCTformer:
    return tiny()


@pytest.fixture(scope="module")
def image_HW3() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (32, 80), (96, 96)])
def test_each_foreground_class_has_two_scores_and_a_map(network, size):
    images_B3HW = torch.randn(2, 3, *size)
    scores, grid = network(images_B3HW), (size[0] // 16, size[1] // 16)
    assert scores.class_BC.shape == scores.patch_BC.shape == (2, 3)
    maps_BChw, affinity_BLL = network.maps(images_B3HW, 3)
    assert maps_BChw.shape == (2, 3, *grid) and affinity_BLL.shape == (2, grid[0] * grid[1], grid[0] * grid[1])
    assert not maps_BChw.requires_grad and maps_BChw.min() >= 0


def test_every_parameter_of_deit_small_for_voc_is_counted_and_trained():
    """22,050,664 in DeiT-S, less its head (385,000) and last norm; 19 more class tokens and positions; 20 filters of 3 x 3.

    The released code counts 21,749,396, which are these and the last norm's 768.
    """
    network = MCTformer(21, image_size=32)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    positions = (14**2 - 2**2) * 384  # those of 224 x 224 pixels that this network lacks
    assert parameters + positions == 22_050_664 - 385_000 - 2 * 384 + 19 * 2 * 384 + 20 * (384 * 9 + 1) == 21_748_628
    sum(mctformer.losses(network(torch.randn(1, 3, 32, 32)), torch.ones(1, 20)).values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_scores_are_the_class_tokens_mean_and_the_patch_heads_mean(network):
    images_B3HW = torch.randn(2, 3, 64, 64)
    x_BTD, _ = network.embed(images_B3HW)
    x_BTD = network.blocks(x_BTD)
    scores = network(images_B3HW)
    torch.testing.assert_close(scores.class_BC, torch.stack([x_BTD[:, c].mean(1) for c in range(3)], 1))
    torch.testing.assert_close(scores.patch_BC, network.head(x_BTD[:, 3:].mT.reshape(2, 64, 4, 4)).flatten(2).mean(2))


def test_the_losses_are_those_of_each_class_averaged():
    logits = Logits(torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[0.5, 0.5], [-2.0, 1.0]]))
    labels_BC = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = mctformer.losses(logits, labels_BC)
    assert list(found) == ["class", "patch"]
    for value, logits_BC in zip(found.values(), logits, strict=True):
        torch.testing.assert_close(value, F.multilabel_soft_margin_loss(logits_BC, labels_BC))
        chance_BC = 1 / (1 + (-logits_BC).exp())
        torch.testing.assert_close(value, -(labels_BC * chance_BC + (1 - labels_BC) * (1 - chance_BC)).log().mean())


def test_a_block_attends_as_timms_own(network):
    attn = network.blocks[1].attn
    x_BTD = torch.randn(2, 9, 64)
    own = {}
    handle = attn.attn_drop.register_forward_hook(lambda module, given, output: own.update(attention=output))
    attn.fused_attn = False
    attn(x_BTD)
    attn.fused_attn = True
    handle.remove()
    found_BTT = attention_weights(x_BTD, attn.qkv.weight, attn.qkv.bias, attn.num_heads)
    torch.testing.assert_close(found_BTT, own["attention"].mean(1))


def test_maps_are_the_last_blocks_attention_times_what_the_head_finds(network):
    images_B3HW, seen, attentions = torch.randn(2, 3, 64, 96), [], []
    hooks = [block.register_forward_hook(lambda module, given, output: seen.append(given[0])) for block in network.blocks]
    network(images_B3HW)
    for hook in hooks:
        hook.remove()
    for block, x_BTD in zip(network.blocks, seen, strict=True):
        attn = block.attn
        attentions.append(attention_weights(block.norm1(x_BTD), attn.qkv.weight, attn.qkv.bias, attn.num_heads))
    end_BTD = network.blocks[-1](seen[-1])
    patch_BChw = network.head(end_BTD[:, 3:].mT.reshape(2, 64, 4, 6)).relu()
    assert patch_BChw.any()
    affinity_BLL = torch.stack([attention_BTT[:, 3:, 3:] for attention_BTT in attentions]).sum(0)
    for count, used in ((1, attentions[-1:]), (3, attentions[-3:]), (99, attentions)):
        class_BCL = torch.stack([attention_BTT[:, :3, 3:] for attention_BTT in used]).sum(0)
        found = network.maps(images_B3HW, count)
        torch.testing.assert_close(found.maps_BChw, class_BCL.reshape(2, 3, 4, 6) * patch_BChw)
        torch.testing.assert_close(found.affinity_BLL, affinity_BLL)


def test_refinement_gives_each_patch_what_it_takes():
    """The second patch takes half from the first and half from the third; the others take from themselves."""
    affinity_LL = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 2.0]])
    maps_nL = torch.tensor([[4.0, 9.0, 2.0], [0.0, 1.0, 0.0]])
    assert cam_mctformer.refine(maps_nL, affinity_LL, 0).equal(maps_nL)
    assert cam_mctformer.refine(maps_nL, affinity_LL, 1).tolist() == [[4, 3, 4], [0, 0, 0]]
    assert cam_mctformer.refine(maps_nL, affinity_LL, 2).tolist() == [[4, 4, 8], [0, 0, 0]]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_maps_at_one_size_are_refined_then_stretched(network, image_HW3, steps):
    image_13HW = IMAGENET.apply(torch.from_numpy(image_HW3).permute(2, 0, 1)[None].float())  # already has the size of `scale`
    maps_BChw, affinity_BLL = network.maps(image_13HW, 2)
    maps_nL = cam_mctformer.refine(maps_BChw[0, [0, 2]].flatten(1), affinity_BLL[0], steps)
    options = OPTIONS | {"scale": [96, 64], "size": (4, 6), "attention_blocks": 2, "affinity_steps": steps}
    found_nhw = cam_mctformer.activation_maps(network, image_HW3, [1, 3], **options)
    np.testing.assert_allclose(found_nhw.reshape(2, -1), maps.stretch(maps_nL), atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"scales": [0.5, 1.5]}, {"flip": True}, {"affinity_steps": 0}, {"scale": [100, 40], "size": (13, 31)}]
)
def test_maps_have_the_size_that_is_asked_for_and_reach_one(network, image_HW3, options):
    options = OPTIONS | options
    maps_nhw = cam_mctformer.activation_maps(network, image_HW3[:50, :70], [1, 3], **options)
    assert maps_nhw.shape == (2, *options["size"]) and maps_nhw.dtype == np.float32
    assert maps_nhw.min((1, 2)).tolist() == [0, 0] and maps_nhw.max((1, 2)) == pytest.approx([1, 1])
    alone_nhw = cam_mctformer.activation_maps(network, image_HW3[:50, :70], [3], **options)
    np.testing.assert_allclose(alone_nhw[0], maps_nhw[1], atol=1e-3)
    assert np.abs(maps_nhw[0] - maps_nhw[1]).max() > 0.1


def test_a_mirrored_image_gives_mirrored_maps(network, image_HW3):
    mirrored_HW3 = np.ascontiguousarray(image_HW3[:, ::-1])
    maps_nhw, mirrored_nhw = (
        cam_mctformer.activation_maps(network, image, [1, 2], **OPTIONS | {"flip": True}) for image in (image_HW3, mirrored_HW3)
    )
    np.testing.assert_allclose(mirrored_nhw, maps_nhw[:, :, ::-1], atol=1e-4)
    assert np.abs(mirrored_nhw - maps_nhw).max() > 1e-3


def test_a_class_that_the_head_finds_nowhere_has_a_map_of_zeros(image_HW3):
    network = tiny()
    network.head.bias.data[1] = -1e4
    maps_nhw = cam_mctformer.activation_maps(network, image_HW3, [1, 2], **OPTIONS)
    assert maps_nhw[0].max() == pytest.approx(1) and not maps_nhw[1].any()


def test_maps_of_a_network_in_training_are_refused(image_HW3):
    with pytest.raises(AssertionError):
        cam_mctformer.activation_maps(tiny().train(), image_HW3, [1], **OPTIONS)


# ------------------------------------------------------------------------------------------------------------- weights


def imagenet_vit(**options) -> torch.nn.Module:
    torch.manual_seed(4)
    vit = timm.create_model(TINY, pretrained=False, num_classes=10, **{"img_size": 64} | options).eval()
    torch.nn.init.normal_(vit.cls_token)
    return vit


def as_timm(state, path):
    save_file(state, path)


def as_deit(state, path):
    torch.save({"model": state}, path)


@pytest.mark.parametrize("save", [as_timm, as_deit])
def test_it_begins_as_the_imagenet_network(tmp_path, save):
    vit, network = imagenet_vit(), tiny()
    head_CD33 = network.head.weight.clone()
    save(vit.state_dict(), tmp_path / "weights")
    network.load_pretrained(tmp_path / "weights")
    assert network.head.weight.equal(head_CD33)
    images_B3HW = torch.randn(2, 3, 64, 64)
    x_BTD, _ = network.embed(images_B3HW)
    vit.norm_pre.register_forward_hook(lambda module, given, output: entering.append(output))
    entering: list[torch.Tensor] = []
    vit.forward_features(images_B3HW)
    torch.testing.assert_close(x_BTD[:, 3:], entering[0][:, 1:])
    for c in range(3):
        torch.testing.assert_close(x_BTD[:, c], entering[0][:, 0])
    torch.testing.assert_close(network.blocks(entering[0]), vit.blocks(entering[0]))


def test_with_one_class_it_computes_what_the_imagenet_network_does(tmp_path):
    vit, network = imagenet_vit(), MCTformer(2, TINY, image_size=64).eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    network.load_pretrained(tmp_path / "vit.safetensors")
    images_B3HW = torch.randn(2, 3, 64, 64)
    x_BTD = network.blocks(network.embed(images_B3HW)[0])
    torch.testing.assert_close(vit.norm(x_BTD), vit.forward_features(images_B3HW))


def test_positions_of_another_grid_are_resampled(tmp_path):
    vit, network = imagenet_vit(img_size=96), tiny()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    network.load_pretrained(tmp_path / "vit.safetensors")
    grid_1D66 = vit.pos_embed[:, 1:].mT.unflatten(2, (6, 6))
    expected_1D44 = F.interpolate(grid_1D66, scale_factor=4.1 / 6, mode="bicubic")
    torch.testing.assert_close(network.pos_embed[:, 3:], expected_1D44.flatten(2).mT)
    assert network.pos_embed[:, :3].equal(vit.pos_embed[:, :1].expand(1, 3, 64))


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14), (32, 32), (40, 23), (61, 64)])
def test_resampled_positions_have_the_grid_that_is_asked_for(grid):
    constant_1LD = torch.full((1, 14 * 14, 2), 0.5)
    torch.testing.assert_close(
        resize_positions(constant_1LD[0], grid, 0, "bicubic", 0.1), torch.full((grid[0] * grid[1], 2), 0.5)
    )


def change(state, **changes):
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"cls_token": None}, "missing keys (1): cls_token"),
        ({"pos_embed": None}, "missing keys (1): pos_embed"),
        ({"blocks.5.mlp.fc1.bias": None}, "missing keys (1): blocks.5.mlp.fc1.bias"),
        ({"dist_token": torch.zeros(1, 1, 64)}, "unexpected keys (1): dist_token"),
        ({"pos_embed": torch.zeros(1, 18, 64)}, "pos_embed is [1, 18, 64], not [1, 17, 64]"),
        ({"pos_embed": torch.zeros(1)}, "pos_embed is [1], not [1, 17, 64]"),
        ({"cls_token": torch.zeros(1, 20, 64)}, "cls_token is [1, 20, 64], not [1, 1, 64]"),
    ],
)
def test_a_file_of_other_tensors_is_refused(tmp_path, network, changes, reason):
    path, before = tmp_path / "vit.safetensors", network.pos_embed.clone()
    save_file(change(imagenet_vit().state_dict(), **changes), path)
    with pytest.raises(ConfigError) as refused:
        network.load_pretrained(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: does not fit") and reason in message and "\n" not in message
    assert network.pos_embed.equal(before)


def test_a_file_that_is_missing_or_no_weights_is_refused(tmp_path, network):
    with pytest.raises(ConfigError, match="none.pth: does not exist"):
        network.load_pretrained(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ConfigError, match="is a web page"):
        network.load_pretrained(tmp_path / "page.pth")


@pytest.mark.parametrize("name", ["resnet18", "test_vit2", "deit_tiny_distilled_patch16_224", "vit_base_patch32_clip_224"])
def test_a_backbone_that_is_no_plain_vit_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is not a plain ViT"), torch.device("meta"):
        MCTformer(4, name)


@pytest.mark.parametrize("name", ["deit_smal_patch16_224", "hf-hub:someone/deit"])
def test_a_backbone_that_timm_does_not_know_is_refused(name):
    with pytest.raises(ConfigError, match=f"no backbone '{name}'"):
        MCTformer(4, name)


def test_an_image_size_of_half_a_patch_is_refused():
    with pytest.raises(
        ConfigError, match="classify.augment.crop is 72; it must be a multiple of the patch, 16: the nearest are 64 and 80"
    ):
        MCTformer(4, TINY, image_size=72)


# ------------------------------------------------------------------------------------------------------------ learning


def picture(generator: np.random.Generator, present: list[int]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Grey noise, 128 x 128, with a square of 48 pixels for each class in `present`, and the squares' corners."""
    image_HW3 = generator.integers(90, 160, (128, 128, 3)).astype(np.uint8)
    quarters = generator.permutation(4)[: len(present)]
    corners = [(int(quarter) // 2 * 64 + 8, int(quarter) % 2 * 64 + 8) for quarter in quarters]
    for index, (top, left) in zip(present, corners, strict=True):
        image_HW3[top : top + 48, left : left + 48] = COLOURS[index]
    return image_HW3, corners
