"""Tests of bases: kohya's module sets and names, text states, encoding and decoding of images."""

import pytest
import torch

from tests.fullsize import meta_base
from tests.tiny import SCHEDULER, tiny_base, tiny_pipeline
from trainer.bases.base import Sizes, TextStates, alphas_cumprod, compute_type
from trainer.bases.clipbpe import clip_tokenizer

SIZES = Sizes((64, 64), (0, 0), (64, 64))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_full_size_sd15_has_kohyas_module_set_under_kohyas_names():
    base = meta_base("sd15")
    names = base.lora_names()
    assert {component: len(paths) for component, paths in names.items()} == {"unet": 192, "text_encoder": 72}
    assert len(base.conv_names()["unet"]) == 86
    assert (base.native_resolution_px, base.latent_scale) == (512, 0.18215)
    keys = {*names["unet"].values(), *names["text_encoder"].values(), *base.conv_names()["unet"].values()}
    assert len(keys) == 192 + 72 + 86
    assert {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_mid_block_attentions_0_proj_out",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
    } <= keys


def test_the_full_size_sdxl_has_kohyas_module_set_under_sgm_names():
    base = meta_base("sdxl")
    names = base.lora_names()
    counts = {component: len(paths) for component, paths in names.items()}
    assert counts == {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}
    assert len(base.conv_names()["unet"]) == 66
    assert (base.native_resolution_px, base.latent_scale) == (1024, 0.13025)
    keys = {key for table in (*names.values(), base.conv_names()["unet"]) for key in table.values()}
    assert len(keys) == 722 + 72 + 192 + 66
    assert {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k",
        "lora_unet_output_blocks_0_1_proj_out",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_input_blocks_4_0_skip_connection",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_8_0_emb_layers_1",
    } <= keys
    assert not any("down_blocks" in key or "up_blocks" in key or "mid_block" in key for key in keys)


def test_the_shipped_configurations_describe_the_published_networks():
    """Parameter counts of the published models (SDXL's U-Net: 2,567,463,684 in kohya_ss #2639)."""
    sd15, sdxl = meta_base("sd15"), meta_base("sdxl")
    assert parameters(sd15.unet) == 859_520_964
    assert parameters(sd15.vae) == parameters(sdxl.vae) == 83_653_863
    assert parameters(sd15.text_encoders[0]) == parameters(sdxl.text_encoders[0]) == 123_060_480
    assert parameters(sdxl.unet) == 2_567_463_684
    assert parameters(sdxl.text_encoders[1]) == 694_659_840


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_narrow_base_with_full_structure_has_the_full_sizes_key_set(family):
    full, narrow = meta_base(family), tiny_base(family, full_structure=True)
    assert narrow.lora_names() == full.lora_names()
    assert narrow.conv_names() == full.conv_names()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_text_states_are_those_of_diffusers(family):
    base = tiny_base(family)
    captions = ["a photo of sks", "a very different and longer caption"]
    ours = base.encode_text(captions)
    pipeline = tiny_pipeline(base)
    if family == "sd15":
        reference = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
        assert ours.pooled_BP is None
    else:
        reference, _, pooled, _ = pipeline.encode_prompt(
            captions, device="cpu", do_classifier_free_guidance=False
        )
        torch.testing.assert_close(ours.pooled_BP, pooled, rtol=0, atol=0)
    torch.testing.assert_close(ours.hidden_BLD, reference, rtol=0, atol=0)


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm():
    base = tiny_base("sd15")
    encoder = base.text_encoders[0]
    ids = base.token_ids(["a cat"], 0)
    states = encoder(ids, output_hidden_states=True).hidden_states
    expected = encoder.final_layer_norm(states[-2])
    assert torch.equal(base.encode_text(["a cat"], clip_skip=2).hidden_BLD, expected)
    assert torch.equal(base.encode_text(["a cat"], 1).hidden_BLD, base.encode_text(["a cat"]).hidden_BLD)
    assert not torch.equal(expected, base.encode_text(["a cat"]).hidden_BLD)


def test_sdxl_reads_the_last_but_one_layer_without_final_norm_and_pools_at_the_first_end_mark():
    base = tiny_base("sdxl")
    ours = base.encode_text(["a cat"])
    first, second = base.text_encoders
    ids = base.token_ids(["a cat"], 1)
    out1 = first(base.token_ids(["a cat"], 0), output_hidden_states=True)
    out2 = second(ids, output_hidden_states=True)
    assert torch.equal(ours.hidden_BLD, torch.cat([out1.hidden_states[-2], out2.hidden_states[-2]], -1))
    end = ids[0].tolist().index(513)
    assert torch.equal(ours.pooled_BP[0], second.text_projection(out2.last_hidden_state[:1, end])[0])


def test_an_exclamation_mark_is_a_word_even_where_it_is_the_padding():
    """Published SDXL folders pad the second encoder with "!"; the word "!" must stay a word, as in sd-scripts."""
    base = tiny_base("sdxl")
    first, second = (base.token_ids(["wow!"], encoder)[0].tolist() for encoder in (0, 1))
    assert first[:6] == second[:6]
    assert set(first[6:]) == {513}
    assert set(second[6:]) == {33}


def test_captions_are_cut_to_77_tokens_and_keep_their_end_mark():
    base = tiny_base("sd15")
    ids = base.token_ids(["a" * 200], 0)
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 513
    assert base.token_count("abc") == 3


def test_sdxls_prediction_depends_on_the_sizes_and_sd15s_does_not():
    noisy, steps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    other = Sizes((32, 96), (0, 16), (64, 64))
    for family, depends in (("sd15", False), ("sdxl", True)):
        base = tiny_base(family)
        states = base.encode_text(["a cat"])
        same = torch.equal(
            base.predict(noisy, steps, states, [SIZES]), base.predict(noisy, steps, states, [other])
        )
        assert same != depends


def test_sdxls_time_ids_are_original_crop_target_rows_first():
    base = tiny_base("sdxl")
    states = base.encode_text(["a cat"])
    noisy, steps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    ids = tiny_pipeline(base)._get_add_time_ids(
        (100, 200),
        (3, 4),
        (64, 72),
        dtype=torch.float32,
        text_encoder_projection_dim=states.pooled_BP.shape[1],
    )
    reference = base.unet(
        noisy,
        steps,
        encoder_hidden_states=states.hidden_BLD,
        added_cond_kwargs={"text_embeds": states.pooled_BP, "time_ids": ids},
    ).sample
    ours = base.predict(noisy, steps, states, [Sizes((100, 200), (3, 4), (64, 72))])
    assert torch.equal(ours, reference)


def test_an_images_latent_depends_on_its_own_generator_only():
    base = tiny_base("sd15")
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = base.encode_images(pixels, generators(1, 2, 3))
    alone = base.encode_images(pixels[1:2], generators(2))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (3, 4, 8, 8)
    assert not torch.equal(base.encode_images(pixels[1:2], generators(9)), alone)


def test_decoding_says_which_picture_is_not_finite():
    base = tiny_base("sd15")
    latents = torch.zeros(2, 4, 8, 8)
    latents[1] = float("nan")
    images, finite = base.decode_latents(latents)
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype.name == "uint8"
    assert finite == [True, False]


def test_nothing_in_a_base_is_trainable():
    for family in ("sd15", "sdxl"):
        base = tiny_base(family)
        assert not any(p.requires_grad for module in base.modules() for p in module.parameters())
        assert not any(module.training for module in base.modules())


def test_states_can_be_picked_and_joined():
    states = TextStates(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0).view(3, 1))
    picked = states.rows([2, 0, 2])
    assert picked.hidden_BLD[:, 0, 0].tolist() == [4, 0, 4]
    assert TextStates.join([picked, states]).pooled_BP[:, 0].tolist() == [2, 0, 2, 0, 1, 2]
    assert TextStates.join([TextStates(states.hidden_BLD)]).pooled_BP is None


def test_the_noise_schedule_is_ddpms():
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(
        **{k: v for k, v in SCHEDULER.items() if k not in ("set_alpha_to_one", "steps_offset")}
    )
    assert torch.equal(alphas_cumprod(SCHEDULER), reference.alphas_cumprod)


def test_the_compute_type_on_a_cpu_is_fp32_unless_named():
    assert compute_type("auto", "cpu") == torch.float32
    assert compute_type("no", "cpu") == torch.float32
    assert compute_type("bf16", "cpu") == torch.bfloat16
    assert compute_type("fp16", "cpu") == torch.float16


def test_clips_tokenizer_is_built_from_the_installed_table():
    """Token ids of the published tokenizer for known texts; open_clip's own tokenizer agrees (tests/parity)."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.pad_token_id == 49407
    padded = clip_tokenizer(pad_id=0)
    assert padded.pad_token_id == 0
    assert padded("wow!")["input_ids"] == [49406, 2781, 256, 49407]
