"""Weights with a name: from the Hub's cache, downloaded by open_clip, or one line that says how to fetch them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest

from weakclip.checkpoints.clip_files import is_name
from weakclip.config import ClipConfig, ConfigError
from weakclip.data.photometric import NORMALISATIONS
from weakclip.models import hub
from weakclip.models.architectures import named as named_architecture
from weakclip.models.architectures import refusals
from weakclip.models.clip import FrozenClip, open_clip

QUICK, GELU, TAG = "tiny-hub-quickgelu", "tiny-hub", "tiny_tag"


@pytest.fixture(scope="module", autouse=True)
def named(name_tiny_architectures) -> None:
    """The tiny architecture with QuickGELU and with GELU, under names of open_clip."""
    name_tiny_architectures(QUICK, GELU)


@pytest.fixture(autouse=True)
def tag(monkeypatch) -> None:
    """A tag of both tiny models that open_clip has in org/tiny, trained with QuickGELU."""
    entry = open_clip.pretrained._pcfg(hf_hub="org/tiny/", quick_gelu=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, QUICK, {TAG: entry})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, GELU, {TAG: entry})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repository: str, files: list[Path]) -> Path:
    """Put files into the cache, as huggingface_hub lays it out; return the last one's place."""
    place = cache / f"models--{repository.replace('/', '--')}"
    for folder in ("refs", "snapshots/0123abcd"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text("0123abcd")
    for file in files:
        (place / "snapshots/0123abcd" / file.name).symlink_to(file)
    return place / "snapshots/0123abcd" / files[-1].name


@pytest.fixture
def network(cache, tmp_path, monkeypatch) -> list[str]:
    """A Hub whose repositories are the folders in tmp_path/remote; returns the list of the files that are downloaded."""
    downloaded = []

    def download(repo_id, filename, revision=None, cache_dir=None):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        if not (file := tmp_path / "remote" / repo_id / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {filename}")
        downloaded.append(filename)
        return str(cached(cache, repo_id, [file]))

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    return downloaded


def remote(tmp_path: Path, repository: str, files: list[Path]) -> None:
    (tmp_path / "remote" / repository).mkdir(parents=True)
    for file in files:
        (tmp_path / "remote" / repository / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A directory of transformers, with its preprocessor."""
    import transformers

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = text | {"num_hidden_layers": 4, "patch_size": 16, "image_size": 64}
    folder = tmp_path_factory.mktemp("theirs")
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def load(pretrained: object, model: str | None = None) -> FrozenClip:
    return FrozenClip(ClipConfig(model=model, pretrained=str(pretrained), image_size=64), 8)


def same(a: FrozenClip, b: FrozenClip) -> bool:
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_is_in_the_cache_is_taken_without_a_network(cache, tiny_clip):
    cached(cache, "org/tiny", [*tiny_clip.iterdir()])
    by_tag, by_name = load(TAG, QUICK), load("hf-hub:org/tiny")
    assert same(by_tag, load(tiny_clip)) and same(by_name, load(tiny_clip))
    assert by_tag.trained_with == NORMALISATIONS["clip"] and by_name.trained_with is None


def test_a_cached_repository_may_be_of_transformers_layout(cache, theirs):
    cached(cache, "org/theirs", [*theirs.iterdir()])
    assert load("hf-hub:org/theirs").trained_with.mean == (127.5,) * 3


def test_what_is_not_in_the_cache_is_downloaded_once_and_without_noise(network, tmp_path, tiny_clip, caplog):
    remote(tmp_path, "org/tiny", [*tiny_clip.iterdir()])
    assert same(load(TAG, QUICK), load(tiny_clip)) and network == ["open_clip_model.safetensors"]
    assert same(load(TAG, QUICK), load(tiny_clip)) and len(network) == 1
    assert same(load("hf-hub:org/tiny"), load(tiny_clip)) and network[1:] == ["open_clip_config.json"]
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


def test_a_repository_of_transformers_layout_is_downloaded(network, tmp_path, theirs):
    remote(tmp_path, "org/theirs", [*theirs.iterdir()])
    assert load("hf-hub:org/theirs").trained_with.mean == (127.5,) * 3
    assert network == ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "pretrained, model, repository",
    [(TAG, QUICK, "org/tiny"), ("openai", "ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224.openai")],
)
def test_without_a_network_one_line_says_how_to_fetch_a_tag(cache, pretrained, model, repository, caplog):
    with pytest.raises(ConfigError) as caught:
        load(pretrained, model)
    assert str(caught.value).startswith(f"clip.pretrained: {pretrained} of {model} is not in the cache and cannot be downloaded")
    folder = f"weights/{repository.partition('/')[2]}"
    command = f"hf download {repository} --include 'open_clip*' --local-dir {folder}"
    assert f"run: {command}; then set clip.pretrained={folder} clip.model=null" in str(caught.value)
    assert "\n" not in str(caught.value) and not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_without_a_network_a_name_on_the_hub_says_the_same(cache):
    with pytest.raises(ConfigError, match="org/none is not in the cache .* hf download org/none --local-dir weights/none; then"):
        load("hf-hub:org/none")


def test_a_contradiction_is_found_before_a_download(network):
    with pytest.raises(ConfigError, match=f"{TAG} was trained with QuickGELU, but {GELU} computes GELU; set .* to {QUICK}"):
        load(TAG, GELU)
    with pytest.raises(ConfigError, match="clip.model must be null when clip.pretrained is hf-hub:org/tiny: it states its own"):
        load("hf-hub:org/tiny", QUICK)
    with pytest.raises(ConfigError, match="clip.model: only CLIPs with a ViT"):
        load("webli", "ViT-B-16-SigLIP")
    assert network == []


def test_an_unknown_tag_names_those_of_the_model_and_the_model_of_the_tag(cache):
    with pytest.raises(
        ConfigError,
        match="laion2b_s34b_b88k neither exists nor is a tag of open_clip for clip.model=ViT-B-16-quickgelu, whose tags are: "
        "openai, .*; laion2b_s34b_b88k is for clip.model=ViT-B-16 or ViT-g-14",
    ):
        load("laion2b_s34b_b88k", "ViT-B-16-quickgelu")
    with pytest.raises(ConfigError, match="nothing neither exists nor is a tag .*, whose tags are: tiny_tag$"):
        load("nothing", QUICK)
    with pytest.raises(ConfigError, match="openai does not exist; for a tag of open_clip set clip.model"):
        load("openai")


def test_a_rank_that_does_not_see_the_first_ranks_cache_looks_itself(cache, tiny_clip, monkeypatch):
    cached(cache, "org/tiny", [*tiny_clip.iterdir()])
    monkeypatch.setattr(hub, "on_first", lambda work: Path("/cache of/another node"))
    assert same(load(TAG, QUICK), load(tiny_clip))


def test_a_directory_comes_before_a_tag_of_its_name(cache, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_name("openai") and is_name("hf-hub:org/name") and not is_name("demo") and not is_name("weights/ViT-B-16.pt")
    Path(TAG).symlink_to(tiny_clip)
    assert not is_name(TAG) and same(load(TAG), load(tiny_clip))


def test_all_tags_of_supported_models_are_on_the_hub():
    """So the files to look for, and the command that fetches them, are those of a repository."""
    supported = [name for name in open_clip.list_models() if not list(refusals(named_architecture(name)))]
    for name in supported:
        for tag in open_clip.pretrained.list_pretrained_tags_by_model(name):
            repository, _, file = open_clip.pretrained.get_pretrained_cfg(name, tag)["hf_hub"].rpartition("/")
            assert repository and not file
