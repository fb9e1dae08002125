"""Every setting of the project, as typed dataclasses. A recipe is a YAML file, read by weakclip.recipe; no key is ignored.

A field's docstring says what it means and in which unit. Defaults are the published recipe for PASCAL VOC. A value of the wrong
type or out of range raises a ConfigError that names the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from weakclip.registry import CAM_SOURCES, DATA_SETS, LOSSES, NETWORKS
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import RunDir


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range. The message names the key and how to fix it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(key: str, value: str | None, choices: Sequence[str]) -> None:
    _require(value in choices, f"{key} must be one of {', '.join(choices)}, is {value!r}")


def require_whole_patches(key: str, side: int, patch: int) -> None:
    """Raise ConfigError with the nearest multiples unless `side`, in pixels, is a multiple of a ViT's patch. key: its name."""
    below = side - side % patch
    nearest = f"{below} and {below + patch}" if below else f"{patch} and {2 * patch}"
    _require(below == side, f"{key} is {side}; it must be a multiple of the patch, {patch}: the nearest are {nearest}")


@dataclass
class BuildConfig:
    """What the stage `shards` and `weakclip build` build a shard set from. Paths are directories unless stated otherwise."""

    source: str | None = None
    """Layout of the images and labels: coco, voc or folder. Null: the set already exists, and there is no stage `shards`."""
    images: str | None = None
    """Directory of the images. Their labels come from `annotations` (coco) or `labels` (folder)."""
    annotations: str | None = None
    """COCO's annotation file, instances_*.json."""
    devkit: str | None = None
    """The directory VOCdevkit/VOC2012."""
    split: str | None = None
    """trainaug, train, val or test (in ImageSets/Segmentation of the devkit), or a file that lists image names."""
    labels: str | None = None
    """File of image labels: a CSV with the columns file,labels (folder), or a cls_labels.npy for images without XML (voc)."""
    masks: bool = False
    """Add the ground-truth masks that the data set has, for evaluation."""
    mask_dir: str | None = None
    """Directory of ground-truth masks for evaluation: NAME.png with class indices (folder)."""
    recursive: bool = False
    """Whether images, masks and CAMs in subfolders count (folder)."""
    exif: str = "stored"
    """How images with an EXIF orientation are used: stored, as COCO's tools and Pillow do, or upright. Then they are turned,
    and so are masks, seeds and CAMs, unless these have the upright size already."""
    strict: bool = False
    """Whether labels, CAMs, seeds and masks that disagree are an error instead of a warning."""
    cams: str | None = None
    """Directory with NAME.npy or NAME.npz (CAMs) or NAME.png (seed masks) for each image; null: no CAMs."""
    cam_keys: str = "foreground0"
    """What the keys in CAM files mean: foreground0 (foreground classes from 0), class (class indices) or coco (COCO's ids)."""
    samples_per_shard: int = 256
    """Images per shard."""
    processes: int = 4
    """Number of worker processes; each writes whole shards."""

    def __post_init__(self) -> None:
        _require(self.samples_per_shard >= 1, "data.build.samples_per_shard must be 1 or more")
        _require(self.processes >= 1, "data.build.processes must be 1 or more")
        _require_choice("data.build.exif", self.exif, EXIF)
        choices = CAM_KEYS if self.source in (None, "coco") else CAM_KEYS[:2]
        _require_choice("data.build.cam_keys", self.cam_keys, choices)
        if self.source is None:
            return
        _require_choice("data.build.source", self.source, list(DATA_SETS))
        data_set = DATA_SETS[self.source]
        for name in data_set.required:
            _require(getattr(self, name) is not None, f"data.build.{name} is missing; data.build.source={self.source} needs it")
        always = ("source", "cams", "cam_keys", "exif", "strict", "samples_per_shard", "processes")
        for item in fields(self):
            unused = item.name not in (*always, *data_set.options) and getattr(self, item.name) != item.default
            _require(not unused, f"data.build.{item.name} has no effect with data.build.source={self.source}; leave it out")


STORED, UPRIGHT = EXIF = ("stored", "upright")

CAM_KEYS = ("foreground0", "class", "coco")
"""What the keys in a CAM file mean: foreground classes from 0, class indices (0: background), or COCO category ids."""


@dataclass
class DataConfig:
    """Which shard sets are used, and how they are read."""

    train: str = "data/voc/trainaug"
    """Shard set to train on: a directory with index.json, or its URL (http, https, s3, gs)."""
    labelled: str | None = None
    """Labelled shard set for which the stage `cam` makes CAMs: a directory or URL. The stage writes the same samples with CAMs
    to `train`. Null: `train` already has CAMs or seeds, and there is no stage `cam`."""
    build: BuildConfig = field(default_factory=BuildConfig)
    """What the stage `shards` builds `labelled` from, or `train` where `labelled` is null."""
    mix: dict[str, float] = field(default_factory=dict)
    """Additional shard sets of the same classes to train on: path or URL -> samples of that set per sample of `train`."""
    val: str | None = None
    """Shard set with ground-truth masks for validation. Null: no validation, and the last weights count as the best."""
    scale: list[int] = field(default_factory=lambda: [2048, 512])
    """Maximum long and short side of an image at scale 1, in pixels. The image is resized, keeping its aspect ratio, to the
    largest size within both."""
    workers: int = 4
    """Loader processes per rank; 0 loads in the training process."""
    max_bad_samples: int = 20
    """Number of unreadable samples (of all ranks together) that are skipped and named; one more stops the job."""
    shuffle_window: int = 8
    """Number of shards that are shuffled together, and that reading touches at a time."""
    cache: str | None = None
    """Directory that caches the shards of URLs; processes and nodes may share it. Null: each sample is a request of its own."""
    cache_gib: float = 100.0
    """Size limit of the cache in GiB (2^30 bytes); the least recently used shards are removed first. It must hold
    `shuffle_window` shards, and should hold twice that number because those of the next window are prefetched."""
    retries: int = 8
    """Number of times that a failed request to a URL is repeated; the waits double from half a second to half a minute."""
    timeout: float = 60.0
    """Seconds within which the answer to a request (a sample, 8 MiB of a shard, an index.json) must have arrived."""

    def __post_init__(self) -> None:
        _require(len(self.scale) == 2 and min(self.scale) >= 1, "data.scale must be [long, short], in pixels")
        least = (1 + sum(self.mix.values())) / 1000
        _require(all(weight >= least for weight in self.mix.values()), "data.mix must give each set a share of 1/1000 or more")
        _require(self.workers >= 0, "data.workers must be 0 or more")
        _require(self.max_bad_samples >= 0, "data.max_bad_samples must be 0 or more")
        _require(self.shuffle_window >= 1, "data.shuffle_window must be 1 or more")
        _require(self.cache_gib > 0, "data.cache_gib must be positive")
        _require(self.retries >= 0, "data.retries must be 0 or more")
        _require(self.timeout > 0, "data.timeout must be positive, in seconds")
        if self.labelled is not None:
            _require(self.labelled != self.train, "data.labelled and data.train must differ: data.train gets the CAMs")
            _require("://" not in self.train, "data.train must be a directory: with data.labelled, the stage cam writes it")

    @property
    def built(self) -> str:
        """The shard set that `build` describes: `labelled`, or `train` where no CAMs are made."""
        return self.train if self.labelled is None else self.labelled


@dataclass
class CrfConfig:
    """Dense CRF (Kraehenbuehl and Koltun, NeurIPS 2011): unary term from probabilities, a Gaussian and a bilateral kernel.

    The defaults are the published setting for PASCAL VOC.
    """

    iterations: int = 10
    """Iterations of mean-field inference."""
    gaussian_sxy: float = 3
    """Std of the Gaussian (smoothness) kernel, in pixels."""
    gaussian_compat: float = 3
    """Weight of the Gaussian kernel."""
    bilateral_sxy: float = 83
    """Spatial std of the bilateral (appearance) kernel, in pixels."""
    bilateral_srgb: float = 5
    """Colour std of the bilateral kernel, in levels of 0..255."""
    bilateral_compat: float = 3
    """Weight of the bilateral kernel."""

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "crf: iterations must be 1 or more")
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            _require(getattr(self, name) > 0, f"crf: {name} must be positive")


@dataclass
class SeedConfig:
    """How a CAM becomes a seed mask where a sample has no seed mask of its own (see weakclip.masks.seeds.seed_mask)."""

    background: float = 0.45
    """CAM value (0..1) below which a pixel is background."""
    foreground: float = 0.45
    """CAM value (0..1) from which a pixel takes the strongest class. Between the two thresholds a pixel is ignored (255)."""
    crf: CrfConfig | None = None
    """Dense CRF after each threshold (IRN's confident areas). It costs about a second per image, so for training the stage `cam`
    computes these seed masks once and writes them next to the CAMs. Null: only the thresholds are used."""

    def __post_init__(self) -> None:
        _require(0 <= self.background <= 1, "seeds.background must lie in 0..1")
        _require(self.background <= self.foreground <= 1, "seeds.foreground must lie in seeds.background..1")


@dataclass
class AugmentConfig:
    """Random augmentation of the training samples."""

    crop: int = 512
    """Side of the square training crop, in pixels; a multiple of the patch size."""
    ratio: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Smallest and largest random factor on `data.scale`."""
    max_class_share: float = 0.75
    """A crop in which one class covers this share of the seeded pixels or more is drawn again, up to ten times."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Change brightness (+-32), contrast and saturation (0.5..1.5) and hue (+-18 of 180) at random."""

    def __post_init__(self) -> None:
        _require(self.crop >= 1, "augment.crop must be positive")
        _require(len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1], "augment.ratio must be [low, high], both positive")


@dataclass
class ClipConfig:
    """The frozen CLIP."""

    model: str | None = "ViT-B-16-quickgelu"
    """Name of the architecture in open_clip (a ViT with patch 14 or 16). Null where `pretrained` states its own architecture, as
    a directory and hf-hub: do."""
    pretrained: str = "weights/ViT-B-16.pt"
    """OpenAI's archive; a file of open_clip or Hugging Face; a directory of one, with its open_clip_config.json or config.json; a
    tag of open_clip for `model` (openai, laion2b_s34b_b88k) or hf-hub:ORG/NAME, which open_clip downloads into its cache; "demo"
    (ships with the package); or "none": random initialization, for tests and timings only. docs/weights.md lists the models."""
    image_size: int = 512
    """Image side, in pixels, to whose token grid the position embedding is resized once, when the model is built."""
    name_tokens: int = 5
    """Length to which a tokenized class name is padded, including the start and end tokens."""
    drop_path: float = 0.1
    """Stochastic-depth rate of the last frozen block during training (linear from 0 in the first), as published; 0: none."""
    double_class_embedding: bool = True
    """Add the class embedding twice to the class token, as published. False: CLIP as it was trained."""
    normalisation: str = "imagenet"
    """Mean and std with which images are normalised: imagenet, as published, clip (with which OpenAI's was trained), or source:
    those that `pretrained` states. A tag or directory that states others than the chosen ones is refused; only imagenet may
    stand for clip, because the published recipe uses ImageNet's with OpenAI's weights."""
    taps: list[int] | None = None
    """Indices, from 0, of the four blocks that feed the pyramid. Null: 3, 5, 7, 11 of twelve, the same fractions of other
    depths."""

    def __post_init__(self) -> None:
        _require(self.name_tokens >= 3, "clip.name_tokens must be 3 or more: start, name, end")
        _require_choice("clip.normalisation", self.normalisation, ("imagenet", "clip", "source"))
        _require(self.taps is None or len(self.taps) == 4, "clip.taps must be four block numbers")
        _require(0 <= self.drop_path < 1, "clip.drop_path must lie in 0..1")


@dataclass
class PromptConfig:
    """The text prompt in front of each class name."""

    length: int = 8
    """N, the number of learnable embeddings between the start token and the class name."""
    words: str | None = None
    """Fixed words to use instead, such as "a photo of a"; they are not trained, and N is the number of their tokens."""

    def __post_init__(self) -> None:
        _require(self.length >= 1, "prompts.length must be 1 or more")


@dataclass
class AdapterConfig:
    """The pyramid adapter on the frozen vision tower."""

    train: bool = True
    """Train the adapter, as in the paper. False: it keeps its random initialization except for BatchNorm's statistics, as in the
    released recipe, whose learning rate of 0 for the backbone applies to the adapter as well."""


@dataclass
class MatchingConfig:
    """Co-attention matching of texts and pixels (paper, section 3.3)."""

    width: int = 256
    """Width of the co-attention layers; a multiple of `heads`."""
    layers: int = 3
    """Co-attention layers per branch. 0: no co-attention; the score map compares texts and pixels as CLIP embeds them."""
    heads: int = 4
    """Attention heads per layer."""
    dropout: float = 0.1
    """Dropout rate of the attention outputs and in the MLPs."""
    temperature: float = 0.1
    """Initial value of alpha and beta (the paper's temperatures)."""
    chained: bool = False
    """Feed each layer the output of the previous one. False is the published behaviour: every layer reads the branch's input,
    only the last layer's output is used, and the others never get a gradient."""
    extra_names: list[str] = field(default_factory=list)
    """Names that are matched in addition to the classes and guide the decoder, but are never predicted."""

    def __post_init__(self) -> None:
        _require(self.width % self.heads == 0, "matching.width must be a multiple of matching.heads")
        _require(self.layers >= 0, "matching.layers must be 0 or more")


@dataclass
class DecoderConfig:
    """The text-guided decoder: FPN neck and semantic-FPN head (paper, section 3.4)."""

    fpn_channels: int = 256
    """Channels of the neck's feature maps."""
    head_channels: int = 256
    """Channels of the head's feature maps."""
    dropout: float = 0.1
    """Probability with which a channel is dropped before the head's classifier."""
    align_corners: bool = True
    """Resize the score map to the pyramid's levels with aligned corners, as published."""
    score_map: bool = True
    """Give the decoder the score map. False: it sees only the pyramid and no text; `loss.weights.auxiliary` must then be 0, and
    neither the prompts nor the matching are trained."""


@dataclass
class LossConfig:
    """The losses of WeakCLIP."""

    grid: list[int] = field(default_factory=lambda: [64, 64])
    """Height and width of the grid on which the seeding and the boundary loss are computed."""
    align_corners: bool | None = None
    """Resize logits to the grid with aligned corners. Null: only if both sides of the grid are odd, as published."""
    weights: dict[str, float] = field(default_factory=lambda: {"seeding": 1.0, "boundary": 1.0, "auxiliary": 0.4})
    """Weight of each loss, by its name in weakclip.registry.LOSSES; 0 turns it off. seeding: cross-entropy on seeded pixels.
    boundary: divergence from the CRF's output. auxiliary: cross-entropy of the score map."""
    balance: bool = True
    """Seeding loss: average foreground and background separately, image by image, as published. False: the paper's plain mean."""
    tau: float = 0.07
    """Temperature that divides the score map in the auxiliary loss."""

    def __post_init__(self) -> None:
        _require(len(self.grid) == 2 and min(self.grid) >= 2, "loss.grid must be [height, width], each 2 or more")
        for name, weight in self.weights.items():
            _require(name in LOSSES, f"loss.weights: unknown loss {name!r}; the losses are {', '.join(LOSSES)}")
            _require(weight >= 0, f"loss.weights.{name} must be 0 or more")
        _require(any(self.weights.values()), "loss.weights: at least one loss needs a positive weight")


@dataclass
class BoundaryConfig:
    """The boundary loss: the divergence of the probabilities from a dense CRF's output on them."""

    engine: str = "auto"
    """What computes the CRF. lattice: pydensecrf's permutohedral lattice on a CPU core, as published. exact: all pairs of pixels,
    as matrix products on the device. auto: exact on GPUs, lattice on CPUs."""
    ratio_clamp: list[float] | None = field(default_factory=lambda: [0.05, 20.0])
    """Clamp psi / p to these bounds, as published (no gradient outside). Null: the paper's plain divergence."""
    truncate_image: bool = True
    """Truncate the image that the CRF sees to 8 bits, as published. False: round it."""

    def __post_init__(self) -> None:
        _require_choice("boundary.engine", self.engine, ("auto", "exact", "lattice"))
        clamp = self.ratio_clamp
        _require(clamp is None or (len(clamp) == 2 and 0 < clamp[0] < clamp[1]), "boundary.ratio_clamp must be [low, high] > 0")


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: str = "adamw"
    """adamw, or sgd with momentum 0.9."""
    lr: float = 1e-4
    """Learning rate at the start of the schedule, without the warm-up's factor."""
    weight_decay: float = 3e-5
    """Coefficient of the weight decay."""
    decay: str = "all"
    """Parameters that `weight_decay` acts on: all, or weights (only those of linear layers and convolutions; no bias, norm or
    embedding)."""
    schedule: str = "cosine"
    """How the learning rate decays to `min_lr`: cosine, or poly (a power of the remaining share of the steps)."""
    power: float = 0.9
    """Exponent of the poly schedule."""
    warmup: int = 1500
    """Steps of linear warm-up, starting at 1e-6 of the learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the schedule."""
    clip_grad: float = 0.0
    """Maximum norm of the gradient; 0: no clipping, as published."""

    def __post_init__(self) -> None:
        _require(self.optimizer in ("adamw", "sgd"), "optim.optimizer must be adamw or sgd")
        _require(self.decay in ("all", "weights"), "optim.decay must be all or weights")
        _require(self.schedule in ("cosine", "poly"), "optim.schedule must be cosine or poly")
        _require(self.lr > 0 and self.power > 0, "optim.lr and optim.power must be positive")
        _require(0 <= self.min_lr <= self.lr, "optim.min_lr must lie in 0..optim.lr")


@dataclass
class TrainConfig:
    """Length and batches of a training, and how often it logs, validates and saves."""

    steps: int = 20000
    """Number of optimizer steps."""
    batch: int = 8
    """Images per rank and micro-step; the global batch is batch x accumulate x ranks."""
    accumulate: int = 1
    """Micro-steps per optimizer step (gradient accumulation)."""
    deepspeed: str = "configs/deepspeed/zero1.json"
    """JSON file with DeepSpeed's own settings (ZeRO stage and buffers)."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    validate_every: int = 500
    """Steps between two validations."""
    validate_images: int | None = None
    """Number of images to validate on, the first ones of `data.val`; null: all."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints that are kept: the newest ones."""
    pictures: int = 4
    """Number of images of the newest batch that TensorBoard shows at each validation."""
    compile: str = "auto"
    """Compile the costly parts of a step by torch.compile: on, off, or auto (on GPUs, except with ZeRO stage 3). The first step
    then takes a minute or two, less where an earlier run has left compiled code in the user's cache directory. WeakCLIP's
    setting also applies to its pseudo masks on GPUs, where auto compiles if a task has a thousand masks or more to write."""

    def __post_init__(self) -> None:
        self.compile = {"True": "on", "False": "off"}.get(self.compile, self.compile)  # YAML reads on and off as booleans
        _require_choice("train.compile", self.compile, ("auto", "on", "off"))
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name} must be 1 or more")


@dataclass
class InferenceConfig:
    """How masks are predicted: `pseudo` for pseudo masks, `retrain.test` for the masks of a retrained network."""

    scales: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    """Factors on `data.scale`; probabilities are averaged over them."""
    flip: bool = True
    """Average each scale with its horizontal flip."""
    window: int = 512
    """Side of the sliding window, in pixels."""
    stride: int = 341
    """Distance between two windows, in pixels; at most `window`."""
    window_batch: int | None = None
    """Windows per forward pass, from all scales and flips of one image. Null: 16 on a GPU, 4 on a CPU."""
    crf: CrfConfig | None = field(default_factory=CrfConfig)
    """Dense CRF at full resolution; null: none."""
    restrict_to_labels: bool = False
    """Zero the probability of classes that the image's labels exclude (training images only). Without it, the stage `pseudo`
    counts the images in whose masks such classes appear."""
    soft: bool = False
    """Also write the probabilities before the CRF: NAME.npz next to NAME.png."""
    processes: int | None = None
    """Worker processes that run the CRF and write the files, in addition to the network's process; in the stage `cam` they run
    the CRF of `seeds.crf`. On a CPU, two or more of them also set the number of images in progress, one core each. Null: one per
    core that this job may use; 0: none."""

    def __post_init__(self) -> None:
        _require(bool(self.scales) and min(self.scales) > 0, "pseudo.scales must be positive numbers")
        _require(0 < self.stride <= self.window, "pseudo.stride must lie in 1..pseudo.window")
        _require(self.window_batch is None or self.window_batch >= 1, "pseudo.window_batch must be 1 or more, or null")
        _require(self.processes is None or self.processes >= 0, "pseudo.processes must be 0 or more, or null")

    def single_scale(self) -> InferenceConfig:
        """Return the fast settings for validation: one scale, no flip, no CRF."""
        return replace(self, scales=[1.0], flip=False, crf=None)


@dataclass
class CamConfig:
    """How CAMs are made from image labels: by the frozen CLIP without training (CLIP-ES, CVPR 2023), or MCTformer (CVPR 2022)."""

    source: str = "clip"
    """Source of the CAMs: clip, or mctformer, which the stage `classify` trains first. Prompts and boxes apply to clip only."""
    prompts: list[str] = field(default_factory=lambda: ["a clean origami {}."])
    """Templates of the texts, each with {} in place of the class name. Of several, the one with the lowest sharpness is used."""
    prompt_images: int = 256
    """Number of images, spread evenly over the set, on which sharpness is measured; only those with two or more labels count."""
    synonyms: dict[str, str] = field(default_factory=dict)
    """Replacements in the texts for class names that CLIP understands badly: {person: people}."""
    background_names: list[str] = field(
        default_factory=lambda: [
            "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
            "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley",
            "bridge", "sign",
        ]
    )  # fmt: skip
    """Names that compete with an image's labels in the softmax. Empty: all other classes compete."""
    normalisation: str = "clip"
    """Mean and std with which images are normalised, as in CLIP's training: clip (OpenAI's), imagenet (the demo's), or source, as
    `clip.normalisation`."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Factors on `data.scale`; maps are averaged over them. Sides are rounded to whole patches."""
    flip: bool = False
    """Average each scale with its horizontal flip."""
    attention_blocks: int = 8
    """Number of last blocks whose attention is averaged; all where the tower has fewer."""
    box_threshold: float = 0.4
    """Share of a map's maximum from which a cell counts as strong. The affinity spreads only what lies in the bounding boxes of
    strong cells."""
    affinity_steps: int = 2
    """t, the number of times that the affinity is applied; 0: softmax-GradCAM alone."""

    def __post_init__(self) -> None:
        _require_choice("cam.source", self.source, list(CAM_SOURCES))
        _require(bool(self.prompts), "cam.prompts must have at least one template")
        for prompt in self.prompts:
            _require(prompt.count("{}") == 1, f"cam.prompts: {prompt!r} must have exactly one {{}}, in place of the class name")
        _require(self.prompt_images >= 1, "cam.prompt_images must be 1 or more")
        _require_choice("cam.normalisation", self.normalisation, ("imagenet", "clip", "source"))
        _require(bool(self.scales) and min(self.scales) > 0, "cam.scales must be positive numbers")
        _require(self.attention_blocks >= 1, "cam.attention_blocks must be 1 or more")
        _require(0 <= self.box_threshold <= 1, "cam.box_threshold must lie in 0..1")
        _require(self.affinity_steps >= 0, "cam.affinity_steps must be 0 or more")


@dataclass
class ClassifyConfig:
    """Training of MCTformer on the image labels of `data.labelled`, in RUN/classify. Its activations and attention give CAMs."""

    backbone: str = "deit_small_patch16_224"
    """Name of a plain ViT in timm."""
    pretrained: str | None = None
    """ImageNet weights of the backbone: timm's safetensors or DeiT's .pth; null: random initialization."""
    head_lr: float = 1.0
    """Factor on `optim.lr` for the class tokens and the patch head."""
    drop_path: float = 0.1
    """Stochastic-depth rate of the last block during training (linear from 0 in the first); 0: none."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=224, ratio=[0.4375, 0.625], max_class_share=1.0))
    """Augmentation; the position embedding has the size of `crop`."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, weight_decay=0.05))
    """Optimizer and learning-rate schedule of this training."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=64, steps=10000))
    """Length, batches, logging and checkpoints of this training."""

    def __post_init__(self) -> None:
        _require(self.head_lr > 0, "classify.head_lr must be positive")
        _require(0 <= self.drop_path < 1, "classify.drop_path must lie in 0..1")


@dataclass
class RetrainConfig:
    """Training of an ordinary segmentation network on the pseudo masks, in RUN/retrain/NETWORK, and its test on `data.val`."""

    network: str | None = None
    """resnet38, segmenter or segformer; null: nothing is retrained."""
    backbone: str | None = None
    """Size of the network: wide or narrow (resnet38), timm's name of a DeiT (segmenter), or b0 to b5 (segformer). Null: the
    published size."""
    pretrained: str | None = None
    """ImageNet weights of the backbone, in the format that its authors or its library publish; null: random initialization."""
    head_lr: float = 1.0
    """Factor on `optim.lr` for the parts that are initialized at random even with `pretrained`."""
    targets: str = "pseudo"
    """Masks to train on: pseudo (the masks in RUN/pseudo), or seeds (the seed masks in `data.train`, or those from its CAMs).
    seeds trains in RUN/retrain/NETWORK-seeds and does not involve WeakCLIP: use it for a baseline, or for pseudo masks that
    shards/reshard.py has put into the shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the training samples."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule of this training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, logging and checkpoints of this training."""
    test: InferenceConfig = field(default_factory=InferenceConfig)
    """How `data.val` is segmented: scales, flips, windows, CRF."""

    def __post_init__(self) -> None:
        if self.network is not None:
            _require_choice("retrain.network", self.network, list(NETWORKS))
            backbones = NETWORKS[self.network].backbones
            if self.backbone is not None and self.backbone not in backbones:
                raise ConfigError(f"retrain.backbone: {self.network} has no {self.backbone!r}; pick from {', '.join(backbones)}")
        _require(self.targets in ("pseudo", "seeds"), "retrain.targets must be pseudo or seeds")
        _require(self.head_lr > 0, "retrain.head_lr must be positive")
        _require(not self.test.restrict_to_labels, "retrain.test.restrict_to_labels must be false: test images have no labels")


@dataclass
class DemoConfig:
    """The synthetic world; only `python -m weakclip.demo` uses it."""

    seed: int = 0
    """Seed of the world: another seed draws other images."""
    size: int = 240
    """Number of training images; the world has the same number of unseen images."""
    seeds: str = "cam"
    """cam: train on class activation maps. exact: train on the exact masks (an upper bound for the model and its budget)."""

    def __post_init__(self) -> None:
        _require(self.size >= 8, "demo.size must be 8 or more")
        _require(self.seeds in ("cam", "exact"), "demo.seeds must be cam or exact")


@dataclass
class Config:
    """A recipe: every setting of a run, from the shards to the retrained network."""

    run: str = "runs/voc"
    """Run directory: it holds everything that outlives a job."""
    seed: int = 0
    """Seed of the initialization, of the order of the samples and of their augmentation."""
    precision: str = "auto"
    """fp32, bf16 (autocast; weights and optimizer state stay fp32), or auto: bf16 on GPUs, fp32 on CPUs."""
    classes: str = "voc"
    """voc, coco, demo, or a text file with one class name per line, background first."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shard sets and how they are read."""
    cam: CamConfig = field(default_factory=CamConfig)
    """How CAMs are made from image labels."""
    seeds: SeedConfig = field(default_factory=SeedConfig)
    """How CAMs become seed masks."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation in WeakCLIP's training."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """The frozen CLIP."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """The text prompt in front of each class name."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The pyramid adapter."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Co-attention matching of texts and pixels."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The text-guided decoder."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses of WeakCLIP's training."""
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    """The boundary loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule of WeakCLIP's training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, logging and checkpoints of WeakCLIP's training."""
    pseudo: InferenceConfig = field(default_factory=InferenceConfig)
    """How pseudo masks are predicted."""
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    """Training of MCTformer, for `cam.source` mctformer."""
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    """Training of a segmentation network on the pseudo masks."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """The synthetic world of `python -m weakclip.demo`."""

    def __post_init__(self) -> None:
        _require(self.precision in ("auto", "fp32", "bf16"), "precision must be auto, fp32 or bf16")
        unused = not self.decoder.score_map and self.loss.weights.get("auxiliary", 0)
        _require(
            not unused, "decoder.score_map=false needs loss.weights.auxiliary=0: that loss trains a score map that nothing uses"
        )

    @property
    def run_dir(self) -> RunDir:
        """Paths in the run directory."""
        return RunDir(Path(self.run))
