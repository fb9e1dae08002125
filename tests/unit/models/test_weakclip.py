"""Trainable and frozen parameters: counts, gradients, memory; and the shapes of the parts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weakclip.config import ConfigError, DecoderConfig, MatchingConfig
from weakclip.labels import class_names
from weakclip.models.adapter import PyramidAdapter
from weakclip.models.clip import tokenize
from weakclip.models.decoder import FpnHead, TextGuidedDecoder
from weakclip.models.matching import CoAttentionMatching
from weakclip.models.weakclip import WeakCLIP, parameter_counts
from weakclip.recipe import load
from weakclip.training.sync_batchnorm import CpuSyncBatchNorm2d, synchronise


def images(*size: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(*size)


def trained(model: WeakCLIP, x_B3HW: torch.Tensor) -> WeakCLIP:
    """`model` after one backward pass in training mode."""
    output = model.train()(x_B3HW)
    (output.logits_BKhw.square().mean() + output.scores_BKhw.square().mean()).backward()
    return model


# -------------------------------------------------------------------------------------------------------------- counts


def test_counts_add_up_and_chained_layers_all_get_a_gradient(tiny_model):
    counts = parameter_counts(tiny_model("matching.chained=true"))
    assert counts["without gradient"] == 0
    parts = [n for name, n in counts.items() if name not in ("trainable", "without gradient", "total")]
    assert sum(parts) == counts["total"]


# -------------------------------------------------------------------------------------------------------------- frozen


def test_training_changes_everything_that_is_trained_and_no_bit_of_clip(tiny_model):
    model = tiny_model("clip.drop_path=0.2")
    before, trainable = copy.deepcopy(model.clip.state_dict()), copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(model, images(2, 3, 64, 64))
        optimizer.step()
    after = model.clip.state_dict()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert not model.clip.training and all(parameter.grad is None for parameter in model.clip.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != trainable[name].equal(parameter), name


def test_an_adapter_that_is_not_trained_keeps_its_start_but_for_batch_norm(tiny_model):
    model = tiny_model("adapter.train=false")
    before = copy.deepcopy(model.adapter.state_dict())
    trained(model, images(2, 3, 64, 64))
    assert all(parameter.grad is None for parameter in model.adapter.parameters())
    moved = {name for name, tensor in model.adapter.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"level1.2.running_mean", "level1.2.running_var", "level1.2.num_batches_tracked"}
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_fixed_words_give_the_embedding_of_the_whole_text_and_stay(tiny_model):
    model = tiny_model("prompts.words=cow background")
    text, names = tokenize(["cow background cat", "cow background dog"]), tokenize(["cat", "dog"])
    nothing_0D = torch.zeros(0, model.clip.text.width)
    torch.testing.assert_close(model.clip.text(names, model.prompts_ND), model.clip.text(text, nothing_0D))
    assert trained(model, images(2, 3, 64, 64)).prompts_ND.grad is None


def test_words_that_this_clip_was_not_trained_with_are_refused(repo):
    with pytest.raises(ConfigError, match="prompts.words: this CLIP was not trained with a word of 'an aardvark'"):
        WeakCLIP(load(repo / "configs/demo.yaml", ["prompts.words=an aardvark"]), class_names("demo"))


def test_without_co_attention_the_score_map_is_clips_own(tiny_model):
    model, x_B3HW = tiny_model("matching.layers=0"), images(2, 3, 64, 64)
    with torch.no_grad():
        features, output = model.clip.vision(x_B3HW), model(x_B3HW)
        own_BKhw = torch.einsum(
            "ke,behw->bkhw", F.normalize(model.encode_names(), dim=1), F.normalize(features.visual_BEhw, dim=1)
        )
    torch.testing.assert_close(output.scores_BKhw, own_BKhw)
    trained(model, x_B3HW)
    assert model.prompts_ND.grad.any() and all(p.grad is None for p in model.matching.parameters())


def test_without_the_score_map_the_decoder_is_blind_to_texts(tiny_model):
    model, x_B3HW = tiny_model("decoder.score_map=false", "loss.weights.auxiliary=0"), images(2, 3, 64, 64)
    assert model.decoder.neck.laterals[0].in_channels == model.clip.vision.width
    with torch.no_grad():
        text_KE = model.encode_names()
        assert model(x_B3HW, text_KE).logits_BKhw.equal(model(x_B3HW, text_KE.flip(0)).logits_BKhw)
    model.train()(x_B3HW).logits_BKhw.square().mean().backward()
    resting = {"prompts_ND", *(f"matching.{name}" for name, _ in model.matching.named_parameters())}
    assert {name for name, p in model.named_parameters() if p.grad is None} == resting


def test_extra_names_are_matched_and_guide_the_decoder_but_are_not_predicted(tiny_model):
    model = tiny_model("matching.extra_names=[street sign, hat]")
    output = model(images(2, 3, 64, 64))
    assert output.logits_BKhw.shape[1] == output.scores_BKhw.shape[1] == 4
    assert model.encode_names().shape[0] == 6 and model.decoder.neck.laterals[0].in_channels == 64 + 6


def test_clip_is_neither_among_the_parameters_nor_in_the_state_dict(tiny_model):
    model = tiny_model()
    frozen = {parameter.data_ptr() for parameter in model.clip.parameters()}
    assert frozen.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    assert frozen.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())
    assert not any("clip" in name or "vision" in name or "text." in name for name in model.state_dict())


def test_clip_and_names_move_and_change_type_with_the_model(tiny_model):
    model = tiny_model().double()
    assert all(parameter.dtype == torch.float64 for parameter in model.clip.parameters())
    assert model.names_KL.dtype == torch.int64
    assert model.to("meta").clip.vision.proj.is_meta and model.names_KL.is_meta


def test_no_activation_of_the_vision_tower_is_kept_for_backward(tiny_model):
    model = tiny_model()
    made, kept = [], []
    for module in model.clip.vision.modules():
        if module is not model.clip.vision:
            module.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        trained(model, images(2, 3, 64, 64))
    tensors = [t for output in made for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
    inside = {t.untyped_storage().data_ptr() for t in tensors}
    inside |= {parameter.untyped_storage().data_ptr() for parameter in model.clip.vision.parameters()}
    assert len(tensors) > 20 and len(kept) > 50
    assert inside.isdisjoint(t.untyped_storage().data_ptr() for t in kept)


@pytest.mark.parametrize("chained", [False, True])
def test_only_the_last_layer_of_a_branch_gets_a_gradient_unless_chained(tiny_model, chained):
    model = trained(tiny_model(f"matching.chained={str(chained).lower()}"), images(2, 3, 64, 64))
    for branch in (model.matching.text_branch, model.matching.visual_branch):
        for number, layer in enumerate(branch.layers):
            reached = [p.grad is not None and bool(p.grad.any()) for p in layer.parameters()]
            assert all(reached) if chained or number == 2 else not any(reached)
    others = [p for name, p in model.named_parameters() if ".layers." not in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in others)


def test_the_dead_layers_have_no_effect_unless_chained(tiny_model):
    for chained in ("false", "true"):
        model, x_B3HW = tiny_model(f"matching.chained={chained}"), images(1, 3, 64, 64)
        before = model(x_B3HW).scores_BKhw
        nn.init.normal_(model.matching.text_branch.layers[0].mlp[0].weight)
        assert before.equal(model(x_B3HW).scores_BKhw) == (chained == "false")


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("H, W", [(64, 64), (64, 96), (32, 160)])
def test_logits_at_a_quarter_and_scores_a_token(tiny_model, H, W):
    model = tiny_model()
    output = model(images(2, 3, H, W))
    assert output.logits_BKhw.shape == (2, 4, H // 4, W // 4)
    assert output.scores_BKhw.shape == (2, 4, H // 16, W // 16)
    assert output.scores_BKhw.abs().max() <= 1 + 1e-5


def test_patch_14_runs(tiny_model, save_tiny_clip, tmp_path):
    folder = save_tiny_clip(tmp_path / "patch14", patch_size=14, image_size=56)
    model = trained(tiny_model(f"clip.pretrained={folder}", "clip.image_size=84"), images(2, 3, 84, 56))
    output = model.eval()(images(1, 3, 84, 56))
    assert output.scores_BKhw.shape == (1, 4, 6, 4) and output.logits_BKhw.shape == (1, 4, 24, 16)
    assert output.logits_BKhw.isfinite().all()


def test_given_text_features_are_used_and_images_do_not_mix(tiny_model):
    model, x_B3HW = tiny_model(), images(3, 3, 64, 64)
    whole = model(x_B3HW)
    torch.testing.assert_close(model(x_B3HW, model.encode_names()).logits_BKhw, whole.logits_BKhw)
    torch.testing.assert_close(model(x_B3HW[1:2]).logits_BKhw, whole.logits_BKhw[1:2], rtol=1e-4, atol=1e-5)
    assert not model(x_B3HW, model.encode_names().flip(0)).scores_BKhw.allclose(whole.scores_BKhw)


def test_training_mode_alone_is_random(tiny_model):
    model, x_B3HW = tiny_model("clip.drop_path=0.5"), images(4, 3, 64, 64)
    assert model(x_B3HW).logits_BKhw.equal(model(x_B3HW).logits_BKhw)
    model.train()
    assert not model(x_B3HW).logits_BKhw.equal(model(x_B3HW).logits_BKhw)


def test_frozen_weights_held_in_bf16_give_the_same_results(tiny_model):
    model, images = tiny_model("precision=bf16"), torch.randn(2, 3, 64, 64)
    before = model(images)
    model.cast_frozen()
    after = model(images)
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    assert model.clip.vision.conv1.weight.dtype == torch.bfloat16 and model.clip.vision.ln_post.weight.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tiny_model):
    model = trained(tiny_model("precision=bf16"), images(2, 3, 64, 64))
    output = model.eval()(images(2, 3, 64, 64))
    assert output.logits_BKhw.dtype == torch.bfloat16
    assert (
        {p.dtype for p in model.parameters()} == {torch.float32} == {p.grad.dtype for p in model.parameters() if p.requires_grad}
    )
    exact = tiny_model()(images(2, 3, 64, 64))
    torch.testing.assert_close(output.scores_BKhw.float(), exact.scores_BKhw, rtol=0, atol=0.05)


def test_auto_is_fp32_on_a_cpu(tiny_model):
    assert tiny_model("precision=auto")(images(1, 3, 64, 64)).logits_BKhw.dtype == torch.float32


def test_the_seed_decides_the_start(tiny_config):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(WeakCLIP(tiny_config(), class_names(tiny_config().classes)).state_dict())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert not states[0]["prompts_ND"].equal(states[2]["prompts_ND"])


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("h, w", [(4, 4), (2, 6), (5, 3)])
def test_the_adapters_pyramid_is_at_strides_4_8_16_32(h, w):
    pyramid = PyramidAdapter(8)([torch.randn(2, 8, h, w) for _ in range(4)])
    assert [tuple(level.map_BDHW.shape[2:]) for level in pyramid] == [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)]


def test_scores_are_cosines_of_what_the_branches_leave_when_temperatures_are_zero():
    matching = CoAttentionMatching(8, MatchingConfig(width=8, heads=2, temperature=0.0)).eval()
    text_KE, global_BE, visual_BEhw = torch.randn(3, 8), torch.randn(2, 8), torch.randn(2, 8, 2, 3)
    want = torch.cosine_similarity(text_KE[None, :, :, None, None], visual_BEhw[:, None], dim=2)
    torch.testing.assert_close(matching(text_KE, global_BE, visual_BEhw), want)


def test_the_class_token_gives_context_to_the_scores():
    matching = CoAttentionMatching(8, MatchingConfig(width=8, heads=2)).eval()
    text_KE, visual_BEhw = torch.randn(3, 8), torch.randn(1, 8, 2, 2)
    assert not matching(text_KE, torch.randn(1, 8), visual_BEhw).equal(matching(text_KE, torch.randn(1, 8), visual_BEhw))


def test_the_head_convolves_each_level_as_often_as_it_is_doubled():
    assert [len(level) for level in FpnHead(8, 8, 3, 0.1).scales] == [1, 1, 2, 3]


@pytest.mark.parametrize("align", [True, False])
def test_the_neck_sees_each_level_with_the_score_map_resized_to_it(align):
    """Outputs and gradients of a plain 1x1 convolution on the level's map and the scores, concatenated."""
    adapter = PyramidAdapter(6).double()
    neck = TextGuidedDecoder(6, 3, 3, DecoderConfig(4, 4, 0.0, align_corners=align)).double().neck
    taps = [torch.randn(2, 6, 4, 6, dtype=torch.float64) for _ in range(4)]
    scores_BKhw = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    for number, lateral in enumerate(neck.laterals):
        watched = [scores_BKhw, *lateral.parameters(), *getattr(adapter, f"level{number + 1}").parameters()]

        def with_gradients(of, watched=watched):
            out = of()
            return out, torch.autograd.grad(out.square().sum(), watched)

        def plain(number=number, lateral=lateral):
            map_BDHW = adapter(taps)[number].map_BDHW
            resized = F.interpolate(scores_BKhw, size=map_BDHW.shape[2:], mode="bilinear", align_corners=align)
            return F.conv2d(torch.cat([map_BDHW, resized], dim=1), lateral.weight, lateral.bias)

        ours = with_gradients(lambda number=number, lateral=lateral: lateral(adapter(taps)[number], scores_BKhw))
        torch.testing.assert_close(ours, with_gradients(plain))


def test_norms_of_a_single_rank_stay_as_they_are():
    norm = nn.BatchNorm2d(3)
    assert type(synchronise(norm, torch.device("cpu"), ranks=1)) is nn.BatchNorm2d


def test_synchronised_norms_equal_plain_ones_in_a_single_process():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    synchronised = synchronise(copy.deepcopy(plain), torch.device("cpu"), ranks=2)
    assert [type(synchronised[i]) for i in (1, 3)] == [CpuSyncBatchNorm2d] * 2
    for module in (plain, synchronised):
        for _ in range(2):
            module(images(2, 3, 5, 5)).square().sum().backward()
    x_B3HW = images(2, 3, 5, 5)
    assert plain(x_B3HW).equal(synchronised(x_B3HW)) and plain.eval()(x_B3HW).equal(synchronised.eval()(x_B3HW))
    for (name, a), b in zip(plain.state_dict().items(), synchronised.state_dict().values(), strict=True):
        assert a.equal(b), name
    for a, b in zip(plain.parameters(), synchronised.parameters(), strict=True):
        assert a.grad.equal(b.grad)
