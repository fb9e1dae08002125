"""The synthetic world is reproducible and matches its masks and captions, and the shipped CLIP knows its words."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weakclip.checkpoints import clip_files
from weakclip.config import ClipConfig
from weakclip.demo import clip, image_pool, statistics, world
from weakclip.demo.mimetic_init import begin_near
from weakclip.labels import DEMO, DEMO_WORDS
from weakclip.models.pretrained import load_clip, pack_tokens, unpack_tokens

SHIPPED = clip_files.DEMO


@pytest.fixture(scope="module")
def pictures() -> list[world.Picture]:
    return [world.picture(7, index) for index in range(50)]


def test_the_same_arguments_give_the_same_picture(pictures):
    again = world.picture(7, 3)
    assert np.array_equal(again.image, pictures[3].image) and np.array_equal(again.mask, pictures[3].mask)
    assert (again.classes, again.captions) == (pictures[3].classes, pictures[3].captions)


@pytest.mark.parametrize("other", [(8, 3, False), (7, 4, False), (7, 3, True), (image_pool.TRAIN_SEED + 7, 3, False)])
def test_another_seed_index_or_mode_gives_another_picture(pictures, other):
    seed, index, close_up = other
    assert not np.array_equal(world.picture(seed, index, close_up=close_up).image, pictures[3].image)


def test_masks_hold_the_classes_and_nothing_else(pictures):
    for picture in pictures:
        assert picture.image.shape == (*picture.mask.shape, 3) and picture.image.dtype == picture.mask.dtype == np.uint8
        assert tuple(k for k in np.unique(picture.mask) if k) == picture.classes != ()


def test_objects_fill_a_fifth_to_a_third_of_the_world_and_all_classes_occur(pictures):
    shares = [np.mean(picture.mask > 0) for picture in pictures]
    assert 0.2 < np.mean(shares) < 0.35 and max(shares) < 0.7
    assert {k for picture in pictures for k in picture.classes} == set(range(1, len(DEMO)))


def test_a_class_is_named_in_the_captions_if_and_only_if_it_is_in_the_mask(pictures):
    for picture in pictures:
        for k, name in enumerate(DEMO[1:], start=1):
            assert (name in picture.captions) == (k in picture.classes)
            assert all((name in caption.split()) == (k in picture.classes) for caption in picture.captions[:2])


def test_a_close_up_shows_at_most_one_object():
    close_ups = [world.picture(7, index, 96, close_up=True) for index in range(50)]
    assert {len(picture.classes) for picture in close_ups} == {0, 1}


def test_mosaics_and_their_patches_keep_the_order_of_the_parts():
    images = np.arange(8, dtype=np.uint8).repeat(32 * 32 * 3).reshape(8, 32, 32, 3)
    patches = torch.from_numpy(clip.mosaics(images)[:, ::16, ::16, :1].astype(np.float32)).flatten(1, 2)
    assert clip.split_mosaics(patches)[..., 0].eq(torch.arange(8.0)[:, None]).all()


def test_every_word_of_the_world_is_among_the_shipped_rows(pictures):
    tokenizer = clip.open_clip.SimpleTokenizer(context_length=64)
    texts = [caption for picture in pictures for caption in picture.captions] + list(DEMO)
    known = load_file(SHIPPED / "open_clip_model.safetensors")["token_embedding.row_ids"]
    assert set(tokenizer(texts).unique().tolist()) <= set(known.tolist())


def test_packing_and_unpacking_keep_the_rows_of_a_small_vocabulary():
    ids = torch.tensor([0, 3, 9])
    shipped = pack_tokens({"token_embedding.weight": torch.eye(3), "ln_final.weight": torch.ones(3)}, ids)
    state = unpack_tokens(shipped, vocabulary=10)
    assert state["token_embedding.weight"].shape == (10, 3) and state["token_embedding.weight"][ids].equal(torch.eye(3))
    assert not state["token_embedding.weight"][4:9].any() and state["ln_final.weight"].equal(torch.ones(3))


def test_the_shipped_clip_is_small_and_embeds_pictures_and_names(pictures):
    assert (SHIPPED / "open_clip_model.safetensors").stat().st_size < 15e6
    model, tokenizer = load_clip(ClipConfig(None, "demo")).eval(), clip.open_clip.SimpleTokenizer(context_length=48)
    with torch.inference_mode():
        whole, patches, blocks = clip.encode_patches(model, image_pool.network_input(np.stack([p.image for p in pictures[:4]])))
        names = clip.encode_texts(model, tokenizer(list(DEMO)))
        assert torch.allclose(names, model.encode_text(tokenizer(list(DEMO)), normalize=True), atol=1e-4)
    assert whole.shape == (4, names.shape[1]) and patches.shape == (4, 144, names.shape[1]) and len(blocks) == 6
    assert all(tensor.isfinite().all() for tensor in (whole, patches, names, *blocks))


def test_a_new_tower_looks_at_what_is_alike_and_near_first():
    torch.manual_seed(0)
    tower = clip.open_clip.CLIP(**clip.MODEL_CFG).visual
    begin_near(clip.attentions(tower), tower.positional_embedding[1:])
    tokens = torch.randn(1, 30, clip.MODEL_CFG["vision_cfg"]["width"])
    for block in tower.transformer.resblocks:
        attended = block.attn(tokens, tokens, tokens)[1][0]
        assert (attended.argmax(dim=1) == torch.arange(30)).all()
    columns = tower.positional_embedding[1:].unflatten(0, (12, 12))
    beside, afar = (torch.cosine_similarity(columns[:, 0], columns[:, k]) for k in (1, 11))
    assert (beside > afar).all()


def test_the_card_counts_what_the_masks_show(pictures):
    found = {row[0]: row[1] for row in statistics.statistics(7, 50).rows}
    assert found["objects per image"] == pytest.approx(np.mean([len(picture.classes) for picture in pictures]))
    shares = [100 * np.mean(picture.mask > 0) for picture in pictures]
    assert found["foreground, % of the pixels"] == pytest.approx(np.mean(shares))
    objects = sum(len(picture.classes) for picture in pictures)
    assert found["an object, % of its image: mean"] == pytest.approx(sum(shares) / objects)


def test_the_words_of_the_world_are_listed_where_importing_them_is_light():
    assert {*DEMO_WORDS} == {*DEMO[1:], *world.CLUTTER, *world.GROUNDS}
