"""The networks for retraining: shapes, parameters, and strict loading of their libraries' files."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from weakclip.config import AugmentConfig, Config, ConfigError, RetrainConfig
from weakclip.networks.base import Network
from weakclip.networks.resnet38 import ResNet38
from weakclip.networks.segformer import SegFormer, SegformerConfig
from weakclip.networks.segmenter import Segmenter, timm
from weakclip.networks.wrappers import build_segmentation
from weakclip.registry import NETWORKS

K = 5
SMALL = {
    "resnet38": lambda: ResNet38(K, width=2),
    "segmenter": lambda: Segmenter(K, "deit_tiny_patch16_224", image_size=64),
    "segformer": lambda: SegFormer(K, "b0"),
}
STRIDES = {"resnet38": 8, "segmenter": 16, "segformer": 4}


@pytest.fixture(params=list(SMALL))
def name(request):
    return request.param


@pytest.fixture
def network(name):
    torch.manual_seed(0)
    return SMALL[name]().eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


# --------------------------------------------------------------------------------------------------------- architecture


def built(name: str, num_classes: int, backbone: str | None = None, crop: int = 480) -> Network:
    config = Config(retrain=RetrainConfig(name, backbone, augment=AugmentConfig(crop=crop)))
    return build_segmentation(config, num_classes, pretrained=False).network


@pytest.mark.parametrize(
    ("name", "total", "head"),
    [("resnet38", 124_220_245, 19_149_333), ("segmenter", 25_936_554, 4_000_554), ("segformer", 27_362_773, 3_166_485)],
)
def test_the_published_networks_have_so_many_parameters(name, total, head):
    """DeiT-S without its classifier: 21.7 M, and here 704 positions more; MiT-B2: 24.2 M, whole 27.4 M in the paper."""
    with torch.device("meta"):
        network = built(name, 21, None)
        logits = network.eval()(torch.empty(1, 3, 512, 512))
    assert count(network.parameters()) == total
    assert count(network.head_parameters()) == head
    assert logits.shape == (1, 21, 512 // STRIDES[name], 512 // STRIDES[name])


@pytest.mark.parametrize("name", ["segmenter", "segformer"])  # the ResNet takes a minute: benchmarks/networks.py
def test_the_published_networks_learn_at_full_size(name):
    torch.manual_seed(0)
    network = built(name, 21, None).train()
    logits_BKhw = network(images(1, 64, 64))  # the forward pass above has images of full size
    assert logits_BKhw.shape == (1, 21, 64 // STRIDES[name], 64 // STRIDES[name])
    F.cross_entropy(logits_BKhw, torch.zeros(1, *logits_BKhw.shape[2:], dtype=torch.int64)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_the_trunk_has_the_names_and_sizes_of_released_files():
    with torch.device("meta"):
        trunk = ResNet38(21).trunk.state_dict()
    shapes = {
        "conv1a.weight": [64, 3, 3, 3],
        "b2.conv_branch1.weight": [128, 64, 1, 1],
        "b2_2.conv_branch2b1.weight": [128, 128, 3, 3],
        "b4_5.bn_branch2b1.running_mean": [512],
        "b5.conv_branch2a.weight": [512, 512, 3, 3],
        "b5_2.conv_branch2b1.weight": [1024, 512, 3, 3],
        "b6.conv_branch2a.weight": [512, 1024, 1, 1],
        "b6.conv_branch2b1.weight": [1024, 512, 3, 3],
        "b7.bn_branch2b2.weight": [2048],
        "b7.conv_branch2b2.weight": [4096, 2048, 1, 1],
        "bn7.bias": [4096],
    }
    assert {name: list(trunk[name].shape) for name in shapes} == shapes
    assert "b2_1.conv_branch1.weight" not in trunk
    # 38 layers: the stem's, two for each of 15 basic blocks, three for each bottleneck, and the classifier that is left out.
    branches = [name for name in trunk if "conv" in name and "branch1" not in name]
    assert len(branches) + 1 == 38


@pytest.mark.parametrize("size", [(64, 64), (75, 98), (33, 130)])
def test_logits_of_any_image(name, network, size):
    with torch.no_grad():
        logits_BKhw = network(images(2, *size))
    stride = STRIDES[name]
    padded = name == "segmenter" and any(side % stride for side in size)
    assert logits_BKhw.shape == (2, K, *(size if padded else [-(-side // stride) for side in size]))
    assert logits_BKhw.isfinite().all()


def test_logits_of_the_least_image(network):
    side = network.least_side
    with torch.no_grad():
        assert network(images(1, side, side)).isfinite().all()


def test_padding_is_cut_off():
    network = SMALL["segmenter"]().eval()
    image = images(1, 60, 37)
    padded = F.pad(image, (0, 11, 0, 4))
    with torch.no_grad():
        expected = F.interpolate(network(padded), size=(64, 48), mode="bilinear", align_corners=False)[:, :, :60, :37]
        assert torch.equal(network(image), expected)


def test_every_parameter_learns(name, network):
    network.train()
    loss = F.cross_entropy(network(images(2, 64, 64)).flatten(2), torch.randint(K, (2, (64 // STRIDES[name]) ** 2)))
    loss.backward()
    # Stochastic depth may drop a branch for both images. It is still in the graph, so its gradient exists and is 0.
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.head_parameters())


def test_the_head_is_the_rest_of_the_backbone(name, network):
    head = {id(parameter) for parameter in network.head_parameters()}
    inside = {key.split(".")[0 if name != "segformer" else 1] for key, p in network.named_parameters() if id(p) in head}
    assert inside == {{"resnet38": "head", "segmenter": "decoder", "segformer": "decode_head"}[name]}


def test_a_state_dict_comes_back(name, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "network.pt")
    other = SMALL[name]().eval()
    other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(network(images(1, 64, 80)), other(images(1, 64, 80)))


# ---------------------------------------------------------------------------------------------------------------- loading


def deit(backbone: str = "deit_tiny_patch16_224", **settings):
    torch.manual_seed(2)
    return timm.create_model(backbone, pretrained=False, **settings).eval()


@pytest.mark.parametrize("backbone", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("form", ["model.safetensors", "deit.pth"])
def test_deit_files(backbone, form, tmp_path):
    library = deit(backbone)
    if form.endswith(".pth"):
        torch.save({"model": library.state_dict()}, tmp_path / form)
    else:
        save_file(library.state_dict(), tmp_path / form)
    network = Segmenter(K, backbone, image_size=224).eval()
    network.load_pretrained(tmp_path / form)
    with torch.no_grad():
        assert torch.equal(network.encoder.forward_features(images(1, 224, 224)), library.forward_features(images(1, 224, 224)))


def test_positions_are_resampled_to_the_crops_grid(tmp_path):
    library = deit()
    save_file(library.state_dict(), tmp_path / "model.safetensors")
    network = Segmenter(K, "deit_tiny_patch16_224", image_size=320)
    network.load_pretrained(tmp_path / "model.safetensors")
    grid = library.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(20, 20), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(network.encoder.pos_embed[:, 0], library.pos_embed[:, 0])
    torch.testing.assert_close(network.encoder.pos_embed[:, 1:], expected)


@pytest.mark.parametrize("form", ["", "model.safetensors", "pytorch_model.bin"])
def test_mix_transformer_files(form, tmp_path):
    from transformers import SegformerForImageClassification

    torch.manual_seed(2)
    library = SegformerForImageClassification(SegformerConfig()).eval()  # the default is MiT-B0
    library.save_pretrained(tmp_path)
    if form.endswith(".bin"):
        from safetensors.torch import load_file

        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    network = SMALL["segformer"]()
    network.load_pretrained(tmp_path / form)
    network.eval()
    with torch.no_grad():
        ours, theirs = (
            model(images(1, 64, 96), output_hidden_states=True).hidden_states
            for model in (network.network.segformer, library.segformer)
        )
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def trunk_file(path, **changes) -> ResNet38:
    """A file of the usual conversion's form: the trunk without BatchNorm's counters."""
    torch.manual_seed(2)
    network = ResNet38(20, width=2).eval()
    for module in network.trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    state = {key: tensor for key, tensor in network.trunk.state_dict().items() if not key.endswith("tracked")}
    torch.save(state | changes, path)
    return network


def test_a_pretrained_trunk_is_loaded_and_its_norms_are_frozen(tmp_path):
    library = trunk_file(tmp_path / "res38.pth", **{"fc8.weight": torch.zeros(20, 128, 1, 1)})
    network = ResNet38(K, width=2)
    network.load_pretrained(tmp_path / "res38.pth")
    network.eval()
    with torch.no_grad():
        assert torch.equal(network.trunk(images(1, 64, 64)), library.trunk(images(1, 64, 64)))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    network(images(2, 64, 64)).square().mean().backward()
    optimizer.step()
    same = {key for key, tensor in network.state_dict().items() if torch.equal(tensor, before[key])}
    norms = {key for key in before if key.startswith("trunk.") and ".bn" in key}
    assert same == norms | {"trunk.conv1a.weight"}
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network).train()
    assert not synchronised.trunk.bn7.training and synchronised.head[1].training
    assert ResNet38(K, width=2).train().trunk.bn7.training  # without a file there are no statistics to keep


def wrong_deit(folder):
    state = deit().state_dict()
    del state["norm.bias"]
    state["blocks.0.ls1.gamma"] = torch.ones(192)
    state["pos_embed"] = torch.zeros(1, 190, 192)
    save_file(state, folder / "wrong")


def wrong_mix_transformer(folder):
    state = SMALL["segformer"]().network.segformer.state_dict()
    state.pop("stages.0.layer_norm.bias")
    save_file(state | {"decode_head.classifier.bias": torch.ones(3)}, folder / "wrong")


def wrong_trunk(folder):
    trunk_file(folder / "wrong", **{"b8.conv_branch1.weight": torch.ones(2), "bn7.bias": torch.ones(3)})


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        (
            "segmenter",
            wrong_deit,
            ["missing keys (1): norm.bias", "unexpected keys (1): blocks.0.ls1.gamma", "pos_embed is [1, 190, 192]"],
        ),
        (
            "segformer",
            wrong_mix_transformer,
            ["missing keys (1): stages.0.layer_norm.bias", "unexpected keys (1): decode_head.classifier.bias"],
        ),
        ("resnet38", wrong_trunk, ["unexpected keys (1): b8.conv_branch1.weight", "bn7.bias is [3], not [128]"]),
        ("resnet38", lambda folder: None, ["does not exist"]),
        ("segformer", lambda folder: (folder / "wrong").mkdir(), ["holds neither model.safetensors nor pytorch_model.bin"]),
        ("segmenter", lambda folder: (folder / "wrong").write_bytes(pickle.dumps(1)), ["before 1.6"]),
    ],
)
def test_a_wrong_file_is_said_in_one_line(name, write, said, tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError) as error:
        SMALL[name]().load_pretrained(tmp_path / "wrong")
    line = str(error.value)
    assert line.startswith(f"pretrained: {tmp_path / 'wrong'}") and "\n" not in line
    assert all(part in line for part in said)


# --------------------------------------------------------------------------------------------------------------- by name


def test_every_backbone_can_be_built():
    with torch.device("meta"):
        for name, entry in NETWORKS.items():
            sizes = {backbone: count(built(name, 3, backbone).parameters()) for backbone in entry.backbones}
            assert len(set(sizes.values())) == len(sizes)
            assert sizes[entry.published] == count(built(name, 3, None).parameters())


def test_the_position_embedding_is_of_the_crop():
    assert built("segmenter", K, "deit_tiny_patch16_224", crop=96).encoder.pos_embed.shape == (1, 1 + 6 * 6, 192)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match="^retrain.network must be one of resnet38, segmenter, segformer, is 'unet'$"):
        built("unet", K)
    with pytest.raises(ConfigError, match="^retrain.backbone: resnet38 has no 'b2'; pick from wide, narrow$"):
        built("resnet38", K, "b2")
