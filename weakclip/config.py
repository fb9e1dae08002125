"""Every knob of the project as a typed dataclass: one YAML file a recipe, `key.sub=value` overrides, nothing ignored.

A field's docstring says what it means and in which unit. Defaults are the published recipe for PASCAL VOC. A key that does
not exist, or a value of another type, is a ConfigError that names the key and the nearest one that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from weakclip.runtime.atomic import write_whole


class ConfigError(ValueError):
    """A setting is unknown, of another type or out of range; the message names the key and the cure."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass
class DataConfig:
    train: str = "data/voc/trainaug"
    """Shard set to train on: a directory with index.json, or its URL (http, https, s3, gs)."""
    build: list[str] = field(default_factory=list)
    """What the stage `shards` makes `train` (or `cam.data`, if that is set) of: options of shards/build.py, without --out and
    --classes; empty: it is there."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further shard sets of the same classes to train on: where each lies, and how many of its samples come for one of `train`"""
    val: str | None = None
    """Shard set with ground-truth masks for validation; null: no validation, and the last weights are the best."""
    scale: list[int] = field(default_factory=lambda: [2048, 512])
    """Largest long and short side, pixels, of an image at scale 1: it is resized, keeping its shape, until one is reached."""
    workers: int = 4
    """Loader processes a rank; 0 loads in the training process."""
    max_bad_samples: int = 20
    """Unreadable samples (all ranks together) that are skipped and named; one more stops the job."""
    shuffle_window: int = 8
    """Shards that are shuffled together; reading touches this many shards at a time."""
    cache: str | None = None
    """Directory that keeps the shards of URLs, which processes and nodes may share; null: each sample is a request of its own."""
    cache_gib: float = 100.0
    """Size of the cache, GiB (2^30 bytes); what was used longest ago leaves first. It must hold `shuffle_window` shards, and
    should hold twice as many: those of the next window are fetched ahead."""
    retries: int = 8
    """How often a request to a URL is repeated, after waits that double from half a second to half a minute."""
    timeout: float = 60.0
    """Seconds in which the answer to a request (a sample, 8 MiB of a shard, an index.json) must have arrived."""

    def __post_init__(self) -> None:
        _require(len(self.scale) == 2 and min(self.scale) >= 1, "data.scale must be [long, short], in pixels")
        least = (1 + sum(self.mix.values())) / 1000
        _require(all(weight >= least for weight in self.mix.values()), "data.mix must give each set a thousandth of all or more")
        _require(self.workers >= 0, "data.workers must be 0 or more")
        _require(self.max_bad_samples >= 0, "data.max_bad_samples must be 0 or more")
        _require(self.shuffle_window >= 1, "data.shuffle_window must be 1 or more")
        _require(self.cache_gib > 0, "data.cache_gib must be positive")
        _require(self.retries >= 0, "data.retries must be 0 or more")
        _require(self.timeout > 0, "data.timeout must be positive, in seconds")


@dataclass
class CrfConfig:
    """Dense CRF: unary from probabilities, a Gaussian (smoothness) and a bilateral (appearance) kernel."""

    iterations: int = 10
    gaussian_sxy: float = 3
    gaussian_compat: float = 3
    bilateral_sxy: float = 83
    bilateral_srgb: float = 5
    bilateral_compat: float = 3


@dataclass
class SeedConfig:
    """How a CAM becomes a seed mask where a sample carries no seed of its own."""

    background: float = 0.45
    """CAM value (0..1) below which a pixel is background."""
    foreground: float = 0.45
    """CAM value (0..1) from which a pixel takes the strongest class; between the two thresholds it is ignored (255)."""
    crf: CrfConfig | None = None
    """Dense CRF after each threshold, whose seed masks the stage `cam` then writes beside the CAMs; null: none."""

    def __post_init__(self) -> None:
        _require(0 <= self.background <= 1, "seeds.background must lie in 0..1")
        _require(self.background <= self.foreground <= 1, "seeds.foreground must lie in seeds.background..1")


@dataclass
class AugmentConfig:
    crop: int = 512
    """Side of the square training crop, pixels; a multiple of the patch size."""
    ratio: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Smallest and largest random factor on `data.scale`."""
    max_class_share: float = 0.75
    """A crop in which one class covers more than this share of the seeded pixels is drawn again, up to ten times."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Random brightness (+-32), contrast and saturation (0.5..1.5) and hue (+-18 of 180)."""

    def __post_init__(self) -> None:
        _require(self.crop >= 1, "augment.crop must be positive")
        _require(len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1], "augment.ratio must be [smallest, largest] > 0")


@dataclass
class ClipConfig:
    model: str | None = "ViT-B-16-quickgelu"
    """open_clip's name of the architecture (a ViT with patch 14 or 16); null where `pretrained` is a directory, which says it."""
    pretrained: str = "weights/ViT-B-16.pt"
    """OpenAI's archive, an open_clip checkpoint, a directory with open_clip_config.json and weights, "demo" (ships with the
    package), or "none": a random start, for tests and timings only."""
    image_size: int = 512
    """Side, pixels, whose token grid the position embedding is resized to once, when the model is built."""
    name_tokens: int = 5
    """Length a tokenised class name is padded to, start and end token included."""
    drop_path: float = 0.1
    """Stochastic depth of the last frozen block during training (linear from 0 in the first), as published; 0: none."""
    double_class_embedding: bool = True
    """Add the class embedding twice to the class token, as published; false: CLIP as it was trained."""
    normalisation: str = "imagenet"
    """Mean and deviation that images are normalised with: imagenet, as published, or clip (what OpenAI's was trained on)."""
    taps: list[int] | None = None
    """The four blocks, from 0, that feed the pyramid; null: 3, 5, 7, 11 of twelve, the same fractions of other depths."""

    def __post_init__(self) -> None:
        _require(self.name_tokens >= 3, "clip.name_tokens must be 3 or more: start, name, end")
        _require(self.normalisation in ("imagenet", "clip"), "clip.normalisation must be imagenet or clip")
        _require(self.taps is None or len(self.taps) == 4, "clip.taps must be four block numbers")
        _require(0 <= self.drop_path < 1, "clip.drop_path must lie in 0..1")


@dataclass
class PromptConfig:
    length: int = 8
    """N, learnable embeddings between the start token and the class name."""
    words: str | None = None
    """Words that stand there instead, and stay as they are, such as "a photo of a"; N is then the number of their tokens."""

    def __post_init__(self) -> None:
        _require(self.length >= 1, "prompts.length must be 1 or more")


@dataclass
class AdapterConfig:
    train: bool = True
    """False: the pyramid adapter keeps its random start but for BatchNorm's statistics, as in the released recipe, whose learning
    rate of 0 for the backbone falls on the adapter as well. The paper trains it."""


@dataclass
class MatchingConfig:
    width: int = 256
    layers: int = 3
    """0: no co-attention; texts and pixels meet as CLIP embeds them."""
    heads: int = 4
    dropout: float = 0.1
    temperature: float = 0.1
    """Initial value of alpha and beta (the paper's temperatures)."""
    chained: bool = False
    """Feed each layer the one before. False is the published behaviour: every layer reads the branch's input, only the last
    one's output is used, and the others never get a gradient."""
    extra_names: list[str] = field(default_factory=list)
    """Names that are matched beside the classes and guide the decoder, but are never predicted."""

    def __post_init__(self) -> None:
        _require(self.width % self.heads == 0, "matching.width must be a multiple of matching.heads")
        _require(self.layers >= 0, "matching.layers must be 0 or more")


@dataclass
class DecoderConfig:
    fpn_channels: int = 256
    head_channels: int = 256
    dropout: float = 0.1
    align_corners: bool = True
    """How the score map is resized to the pyramid's levels: corner pixels onto corner pixels, as published."""
    score_map: bool = True
    """False: the decoder sees the pyramid alone, no text; `loss.auxiliary` must then be 0, and prompts and matching rest."""


@dataclass
class LossConfig:
    grid: list[int] = field(default_factory=lambda: [64, 64])
    """Height and width of the grid on which the seeding and the boundary loss are computed."""
    align_corners: bool | None = None
    """How logits are resized to the grid; null: as published, corners onto corners exactly when both sides are odd."""
    balance: bool = True
    """Average foreground and background apart, image by image, as the published code does; false: the paper's plain mean."""
    boundary: bool = True
    """Use the boundary loss."""
    ratio_clamp: list[float] | None = field(default_factory=lambda: [0.05, 20.0])
    """Bounds of psi / p in the boundary loss, as published (no gradient outside); null: the paper's plain divergence."""
    truncate_image: bool = True
    """Cut the image that the boundary loss' CRF sees to 8 bit, as published; false: round it."""
    auxiliary: float = 0.4
    """Weight of the cross-entropy of the score map; 0 turns it off."""
    tau: float = 0.07
    """Temperature that divides the score map in the auxiliary loss."""

    def __post_init__(self) -> None:
        _require(len(self.grid) == 2 and min(self.grid) >= 2, "loss.grid must be [height, width], each 2 or more")
        clamp = self.ratio_clamp
        _require(clamp is None or (len(clamp) == 2 and 0 < clamp[0] < clamp[1]), "loss.ratio_clamp must be [low, high] > 0")


@dataclass
class OptimConfig:
    optimizer: str = "adamw"
    """adamw, or sgd with momentum 0.9."""
    lr: float = 1e-4
    weight_decay: float = 3e-5
    decay: str = "all"
    """What weight_decay acts on: all, or the weights of linear layers and convolutions alone (no bias, norm or embedding)."""
    schedule: str = "cosine"
    """How the learning rate falls: cosine, or poly (a power of the share that is left)."""
    power: float = 0.9
    """Exponent of the schedule poly."""
    warmup: int = 1500
    """Steps of linear warm-up, from 1e-6 of the learning rate."""
    min_lr: float = 1e-6
    """Where the schedule ends."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0: no clipping, as published."""

    def __post_init__(self) -> None:
        _require(self.optimizer in ("adamw", "sgd"), "optim.optimizer must be adamw or sgd")
        _require(self.decay in ("all", "weights"), "optim.decay must be all or weights")
        _require(self.schedule in ("cosine", "poly"), "optim.schedule must be cosine or poly")
        _require(self.lr > 0 and self.power > 0, "optim.lr and optim.power must be positive")
        _require(0 <= self.min_lr <= self.lr, "optim.min_lr must lie in 0..optim.lr")


@dataclass
class TrainConfig:
    steps: int = 20000
    """Optimiser steps."""
    batch: int = 8
    """Images a rank and micro-step; the global batch is batch x accumulate x ranks."""
    accumulate: int = 1
    """Micro-steps a step."""
    deepspeed: str = "configs/deepspeed/zero1.json"
    """DeepSpeed's own settings (ZeRO stage and buffers)."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    validate_every: int = 500
    """Steps between two validations."""
    validate_images: int | None = None
    """Validate on the first so many images; null: all."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, newest first."""
    pictures: int = 4
    """Images of the newest batch that TensorBoard shows at each validation."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name} must be 1 or more")


@dataclass
class PseudoConfig:
    """Pseudo masks, and the same inference for scores."""

    scales: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    flip: bool = True
    """Average each scale with its mirror image."""
    window: int = 512
    """Side of the sliding window, pixels."""
    stride: int = 341
    window_batch: int = 4
    """Windows a forward pass; they come from all scales and mirror images of an image. A large GPU has room for 16 and more."""
    crf: CrfConfig | None = field(default_factory=CrfConfig)
    """Dense CRF at full resolution; null: none."""
    restrict_to_labels: bool = False
    """Zero the probability of classes that the image's labels exclude (training images only)."""
    soft: bool = False
    """Write the probabilities, too, as they are before the CRF: KEY.npz beside KEY.png."""
    processes: int | None = None
    """Processes for the CRF and the files, beside the network's; two or more, on a CPU: so many images at a time, a core each.
    null: one a core that this job may use; 0: none."""

    def __post_init__(self) -> None:
        _require(bool(self.scales) and min(self.scales) > 0, "pseudo.scales must be positive numbers")
        _require(0 < self.stride <= self.window, "pseudo.stride must lie in 1..pseudo.window")
        _require(self.window_batch >= 1, "pseudo.window_batch must be 1 or more")
        _require(self.processes is None or self.processes >= 0, "pseudo.processes must be 0 or more, or null")

    def single_scale(self) -> PseudoConfig:
        """The quick form, for validation: one scale, no mirror image, no CRF."""
        return replace(self, scales=[1.0], flip=False, crf=None)


@dataclass
class CamConfig:
    """CAMs from image labels: by the frozen CLIP without any training (CLIP-ES, CVPR 2023), or by MCTformer (CVPR 2022)."""

    data: str | None = None
    """Labelled shard set that CAMs are made for: directory or URL. The stage `cam` writes it with CAMs to `data.train`, and
    `data.build` then says how this set is made. Null: no such stage."""
    source: str = "clip"
    """What makes them: clip, or mctformer, which the stage `classify` trains first. Prompts and boxes are clip's alone."""
    prompts: list[str] = field(default_factory=lambda: ["a clean origami {}."])
    """Templates of the texts, each with {} where the name stands. Of several the one with the least sharpness is taken."""
    prompt_images: int = 256
    """Images, spread evenly over the set, on which sharpness is measured; those with two or more labels count."""
    synonyms: dict[str, str] = field(default_factory=dict)
    """What stands in the texts for a class name that CLIP understands badly: {person: people}."""
    background_names: list[str] = field(
        default_factory=lambda: [
            "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
            "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
            "bridge", "sign",
        ]
    )  # fmt: skip
    """Names that compete with an image's labels in the softmax; empty: all classes do."""
    normalisation: str = "clip"
    """Mean and deviation of images, those that CLIP was trained with: clip (OpenAI's) or imagenet (the demo's)."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Factors on `data.scale`; maps are averaged over them. Sides are rounded to whole patches."""
    flip: bool = False
    """Average each scale with its mirror image."""
    attention_blocks: int = 8
    """Last blocks whose attention is averaged; all where the tower has fewer."""
    box_threshold: float = 0.4
    """Share of a map's maximum from which a cell counts: affinity spreads what lies in boxes around such cells."""
    affinity_steps: int = 2
    """t, how often the affinity is applied; 0: softmax-GradCAM alone."""

    def __post_init__(self) -> None:
        _require(self.source in ("clip", "mctformer"), "cam.source must be clip or mctformer")
        _require(bool(self.prompts), "cam.prompts must name a template")
        for prompt in self.prompts:
            _require(prompt.count("{}") == 1, f"cam.prompts: {prompt!r} must have one {{}}, where the name stands")
        _require(self.prompt_images >= 1, "cam.prompt_images must be 1 or more")
        _require(self.normalisation in ("imagenet", "clip"), "cam.normalisation must be imagenet or clip")
        _require(bool(self.scales) and min(self.scales) > 0, "cam.scales must be positive numbers")
        _require(self.attention_blocks >= 1, "cam.attention_blocks must be 1 or more")
        _require(0 <= self.box_threshold <= 1, "cam.box_threshold must lie in 0..1")
        _require(self.affinity_steps >= 0, "cam.affinity_steps must be 0 or more")


@dataclass
class ClassifyConfig:
    """MCTformer, trained on the image labels of `cam.data` in RUN/classify: its activations and attention are the CAMs."""

    backbone: str = "deit_small_patch16_224"
    """timm's name of a ViT."""
    pretrained: str | None = None
    """ImageNet weights of the backbone: timm's safetensors or DeiT's .pth; null: a random start."""
    head_lr: float = 1.0
    """Factor on `optim.lr` for the class tokens and the patch head."""
    drop_path: float = 0.1
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=224, ratio=[0.4375, 0.625], max_class_share=1.0))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, weight_decay=0.05))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=64, steps=10000))

    def __post_init__(self) -> None:
        _require(self.head_lr > 0, "classify.head_lr must be positive")
        _require(0 <= self.drop_path < 1, "classify.drop_path must lie in 0..1")


NETWORKS = ("resnet38", "segmenter", "segformer")
"""That can be trained on pseudo masks."""


@dataclass
class RetrainConfig:
    """An ordinary segmentation network, trained on the pseudo masks in RUN/retrain/NETWORK and tested on `data.val`."""

    network: str | None = None
    """resnet38, segmenter or segformer; null: no such stage."""
    backbone: str | None = None
    """Its size: wide or narrow, timm's name of a ViT, or b0 to b5; null: the published one."""
    pretrained: str | None = None
    """ImageNet weights of the backbone, in the format that its authors or its library publish; null: a random start."""
    head_lr: float = 1.0
    """Factor on `optim.lr` for the parts that begin at random even so."""
    targets: str = "pseudo"
    """What it is trained towards: pseudo (the masks in RUN/pseudo), or seeds (those of `data.train`, or of its CAMs), without
    WeakCLIP, in RUN/retrain/NETWORK-seeds: what a baseline comes to, or pseudo masks that shards/reshard.py put in."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: PseudoConfig = field(default_factory=PseudoConfig)
    """How `data.val` is segmented: scales, mirror images, windows, CRF."""

    def __post_init__(self) -> None:
        _require(self.network is None or self.network in NETWORKS, f"retrain.network must be one of {', '.join(NETWORKS)}")
        _require(self.targets in ("pseudo", "seeds"), "retrain.targets must be pseudo or seeds")
        _require(self.head_lr > 0, "retrain.head_lr must be positive")
        _require(not self.test.restrict_to_labels, "retrain.test.restrict_to_labels: a test image has no labels")


@dataclass
class DemoConfig:
    """The synthetic world; only `python -m weakclip.demo` reads it."""

    seed: int = 0
    """Which world: another seed, other pictures."""
    size: int = 240
    """Training pictures, and as many unseen ones."""
    seeds: str = "cam"
    """cam: train on class activation maps; exact: on the exact masks (the ceiling of model and budget)."""

    def __post_init__(self) -> None:
        _require(self.size >= 8, "demo.size must be 8 or more")
        _require(self.seeds in ("cam", "exact"), "demo.seeds must be cam or exact")


@dataclass
class Config:
    run: str = "runs/voc"
    """Run directory: everything that survives a job is in it."""
    seed: int = 0
    """Seeds the initialisation, the order of the samples and their augmentation."""
    precision: str = "auto"
    """fp32, bf16 (autocast; weights and optimiser stay fp32), or auto: bf16 on GPUs, fp32 on CPU."""
    classes: str = "voc"
    """voc, coco, demo, or a text file with one class name a line, background first."""
    data: DataConfig = field(default_factory=DataConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    seeds: SeedConfig = field(default_factory=SeedConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        _require(self.precision in ("auto", "fp32", "bf16"), "precision must be auto, fp32 or bf16")
        if self.cam.data is not None:
            _require(self.cam.data != self.data.train, "cam.data must be another set than data.train, where it goes with CAMs")
            _require("://" not in self.data.train, "data.train must be a directory, since the stage cam writes it (cam.data)")
        without = not self.decoder.score_map and self.loss.auxiliary
        _require(not without, "decoder.score_map=false needs loss.auxiliary=0, whose score map would be trained for nothing")

    @property
    def labelled(self) -> str:
        """Where the shard set lies that `data.build` makes: `cam.data`, or `data.train` where no CAMs are to be made."""
        return self.data.train if self.cam.data is None else self.cam.data


def load(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The config in the YAML file `path`, or in several, each of which changes those before, and in `overrides` ("seed=1").

    Raises ConfigError on a missing file, an unknown key (naming the nearest), a wrong type or a value out of range.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    for text in overrides:
        _require("=" in text and not text.startswith("-"), f"{text!r}: an override is written key.sub=value")
    merged = OmegaConf.structured(Config)
    for each in paths:
        if not each.is_file():
            raise ConfigError(f"{each}: no such config file")
        merged = _merge(merged, lambda each=each: OmegaConf.load(each), str(each))  # type: ignore[misc]
    for text in overrides:
        merged = _merge(merged, lambda text=text: OmegaConf.from_dotlist([text]), text)  # type: ignore[misc]
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{', '.join(map(str, paths))}: {str(error).splitlines()[0]}") from error


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def _merge(base: Any, read: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(base, read())
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        nearest = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.0)[0]
        raise ConfigError(f"{source}: unknown key {key!r}; the nearest is {nearest!r}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error


def _keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(cls)
    for item in fields(cls):  # type: ignore[arg-type]
        keys.append(prefix + item.name)
        for candidate in (hints[item.name], *getattr(hints[item.name], "__args__", ())):
            if isinstance(candidate, type) and is_dataclass(candidate):
                keys += _keys(candidate, f"{prefix}{item.name}.")
    return keys
