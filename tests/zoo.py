"""A tiny random model of every audio-language class that RRS serves, with hand-made inputs: no download, no processor.

`python tests/zoo.py` measures and prints the table of the README.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from conftest import SPECIAL, byte_tokenizer
from packaging.version import Version
from torch import Tensor, nn

from rrs.hooks import NEEDS

TOKENIZER = byte_tokenizer()
IDS = {token: TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL}
AUDIO, END, PAD = IDS["<|AUDIO|>"], IDS["<|im_end|>"], IDS["<|pad|>"]
VOCAB, HIDDEN = len(TOKENIZER), 32

Built = tuple[nn.Module, Callable[[Any], tuple[int, dict[str, Any]]]]


def frames(wave: np.ndarray, size: int, hop: int = 160) -> Tensor:
    """Stands in for log-mel features: `[frames, size]`, a fixed random projection of `hop` samples each."""
    n = len(wave) // hop
    projection = torch.randn(hop, size, generator=torch.Generator().manual_seed(1)) / 4
    return torch.from_numpy(np.ascontiguousarray(wave[: n * hop])).reshape(n, hop) @ projection


def decoder(model_type: str = "qwen2", **more: Any) -> dict[str, Any]:
    """Sizes of a tiny language model."""
    return {
        "model_type": model_type, "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD, "tie_word_embeddings": False, **more,
    }  # fmt: skip


WHISPER = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 32, "out_hidden_size": HIDDEN}


def padded(features: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`[frames, size] -> [1, length, size]` and its mask `[1, length]`."""
    mask = torch.zeros(1, length, dtype=torch.long)
    mask[0, : len(features)] = 1
    return nn.functional.pad(features, (0, 0, 0, length - len(features)))[None], mask


# -- one builder a class: the model, and (audio tokens, keyword arguments) of a clip -----------------------------------


def qwen2_audio() -> Built:
    config = tf.Qwen2AudioConfig(
        audio_config={**WHISPER, "max_source_positions": 100}, text_config=decoder(), audio_token_index=AUDIO
    )
    model = tf.Qwen2AudioForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features, mask = padded(frames(wave, 16), 200)
        n = ((int(mask.sum()) - 1) // 2 + 1 - 2) // 2 + 1
        return n, {"input_features": features.mT, "feature_attention_mask": mask}

    return model, audio


def _omni(config: Any, model_class: type, tokens: Callable[[int], int]) -> Built:
    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        mask = torch.ones(1, len(features), dtype=torch.long)
        return tokens(len(features)), {"input_features": features.T[None], "feature_attention_mask": mask}

    return model_class(config), audio


def qwen2_5_omni() -> Built:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = tf.Qwen2_5OmniThinkerConfig(
        audio_config={**WHISPER, "max_source_positions": 100, "output_dim": HIDDEN, "n_window": 20},
        vision_config=VISION,
        text_config=decoder("qwen2_5_omni_text", rope_parameters=rope),
        audio_token_index=AUDIO, audio_start_token_id=IDS["<|audio_bos|>"], audio_end_token_id=IDS["<|audio_eos|>"],
        vision_start_token_id=PAD,
    )  # fmt: skip
    return _omni(config, tf.Qwen2_5OmniThinkerForConditionalGeneration, lambda t: ((t - 1) // 2 + 1 - 2) // 2 + 1)


def qwen3_omni_moe() -> Built:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tf.Qwen3OmniMoeThinkerConfig(
        audio_config={**WHISPER, "max_source_positions": 100, "output_dim": HIDDEN, "downsample_hidden_size": 8},
        vision_config={**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        text_config=decoder("qwen3_omni_moe_text", rope_parameters=rope, **experts),
        audio_token_id=AUDIO, audio_start_token_id=IDS["<|audio_bos|>"], vision_start_token_id=PAD,
    )  # fmt: skip
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    return _omni(
        config,
        tf.Qwen3OmniMoeThinkerForConditionalGeneration,
        lambda t: int(_get_feat_extract_output_lengths(torch.tensor(t))),
    )


def _counted(model: nn.Module, length: int, size: int = 16, transpose: bool = True, dtype: Any = torch.long) -> Built:
    """For classes whose get_audio_features returns the flat rows of one clip."""

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features, mask = padded(frames(wave, size), length)
        inputs = {"input_features": features.mT if transpose else features, "input_features_mask": mask.to(dtype)}
        with torch.no_grad():
            return len(model.get_audio_features(**inputs).pooler_output), inputs

    return model, audio


FLAMINGO = {**ENCODER, "num_mel_bins": 16, "max_source_positions": 100}


def audioflamingo3() -> Built:
    config = tf.AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **FLAMINGO}, text_config=decoder(), audio_token_id=AUDIO
    )
    return _counted(tf.AudioFlamingo3ForConditionalGeneration(config), 200)


def musicflamingo() -> Built:
    config = tf.MusicFlamingoConfig(
        audio_config={"model_type": "audioflamingo3_encoder", **FLAMINGO},
        text_config=decoder(),
        audio_token_id=AUDIO,
    )
    model = tf.MusicFlamingoForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features, mask = padded(frames(wave, 16), 200)
        n = (((int(mask.sum()) - 1) // 2 + 1) - 2) // 2 + 1
        return n, {"input_features": features.mT, "input_features_mask": mask}

    return model, audio


def voxtral() -> Built:
    config = tf.VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **ENCODER, "intermediate_size": 64, "num_mel_bins": 16,
                      "max_source_positions": 60},
        text_config=decoder("llama"),
        audio_token_id=AUDIO,
    )  # fmt: skip
    model = tf.VoxtralForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features, _ = padded(frames(wave, 16)[:120], 120)
        return 15, {"input_features": features.mT}  # 60 positions, four to a token, whatever the clip's length

    return model, audio


def _granite(config_class: type, model_class: type, **encoder: Any) -> Built:
    width = 16 * (1 + len(encoder.get("cat_hidden_layers", ())))
    config = config_class(
        encoder_config={"input_dim": 16, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "output_dim": 8,
                        "context_size": 20, "max_pos_emb": 40, "feedforward_mult": 2, "conv_kernel_size": 3, **encoder},
        projector_config={"model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "intermediate_size": 32, "encoder_hidden_size": width,
                          "vocab_size": 8},
        text_config=decoder("granite"),
        audio_token_index=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    model = model_class(config)
    own = peft.LoraConfig(r=2, target_modules=r"model\.language_model.*\.(q|v)_proj", init_lora_weights=False)
    model.add_adapter(own)  # released checkpoints bring a LoRA that is meant for audio only

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        n = -(-len(features) // 15) * 3
        return n, {"input_features": features[None], "input_features_mask": torch.ones(1, n, dtype=torch.bool)}

    return model, audio


def granite_speech() -> Built:
    return _granite(tf.GraniteSpeechConfig, tf.GraniteSpeechForConditionalGeneration)


def granite_speech_plus() -> Built:
    return _granite(tf.GraniteSpeechPlusConfig, tf.GraniteSpeechPlusForConditionalGeneration, cat_hidden_layers=[1])


def phi4_multimodal() -> Built:
    config = tf.Phi4MultimodalConfig(
        audio_config={"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
                      "input_size": 16, "nemo_conv_channels": 16, "ext_pw_out_channel": 16,
                      "depthwise_separable_out_channel": 16, "audio_token_id": AUDIO, "bias_max_distance": 20},
        vision_config={**ENCODER, "image_size": 28, "crop_size": 28, "patch_size": 14, "image_token_id": PAD},
        original_max_position_embeddings=4096, max_position_embeddings=4096,
        **{k: v for k, v in decoder().items() if k not in ("model_type", "head_dim")},
    )  # fmt: skip
    model = tf.Phi4MultimodalForCausalLM(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        n = -(-len(features) // 8)
        return n, {"audio_input_features": features[None], "audio_embed_sizes": torch.tensor([n])}

    return model, audio


def qwen3_asr() -> Built:
    config = tf.Qwen3ASRConfig(
        audio_config={"model_type": "qwen3_asr_encoder", **WHISPER, "output_dim": HIDDEN, "downsample_hidden_size": 8},
        text_config=decoder("qwen3"), audio_token_id=AUDIO, pad_token_id=PAD, eos_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _counted(tf.Qwen3ASRForConditionalGeneration(config), 200)


def glmasr() -> Built:
    config = tf.GlmAsrConfig(
        audio_config={"model_type": "glmasr_encoder", **ENCODER, "intermediate_size": 64, "num_mel_bins": 16,
                      "max_position_embeddings": 100},
        text_config=decoder("llama"), audio_token_id=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    return _counted(tf.GlmAsrForConditionalGeneration(config), 200)


def fun_asr_nano() -> Built:
    config = tf.FunAsrNanoConfig(
        audio_config={"model_type": "fun_asr_nano_encoder", **ENCODER, "num_mel_bins": 16, "num_stacked_frames": 1,
                      "num_timestamp_prediction_layers": 1, "fsmn_kernel_size": 3},
        adaptor_config={"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": HIDDEN // 4,
                        "num_hidden_layers": 1},
        text_config=decoder("qwen3"), audio_token_id=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    return _counted(tf.FunAsrNanoForConditionalGeneration(config), 100, transpose=False)


def moss_transcribe_diarize() -> Built:
    config = tf.MossTranscribeDiarizeConfig(
        audio_config={**ENCODER, "num_mel_bins": 16, "max_source_positions": 100},
        text_config=decoder("qwen3"), audio_token_id=AUDIO, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.MossTranscribeDiarizeForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features, mask = padded(frames(wave, 16), 200)
        n = -(-((int(mask.sum()) - 1) // 2 + 1) // 4)
        samples = torch.ones(1, len(wave), dtype=torch.long)
        return n, {"input_features": features.mT, "input_features_mask": mask, "padding_mask": samples}

    return model, audio


def vibevoice_asr() -> Built:
    tokenizer = {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [8, 8, 8], "depths": [1, 1, 1, 1]}
    config = tf.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **tokenizer},
        semantic_tokenizer_encoder_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **tokenizer},
        text_config=decoder(), audio_token_id=AUDIO, acoustic_tokenizer_chunk_size=5120,
    )  # fmt: skip
    model = tf.VibeVoiceAsrForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        n = len(wave) // 512
        samples = torch.from_numpy(np.asarray(wave))[None, None, : n * 512]
        mask = torch.ones(1, n * 512, dtype=torch.bool)
        return n, {"input_values": samples, "padding_mask": mask, "sample": False}

    return model, audio


def gemma3n() -> Built:
    size = 300  # token ids: 262 of text, then 8 of vision, then 30 of audio; the last embeds padding frames
    vision = tf.models.gemma3n.Gemma3nVisionConfig(hidden_size=16, vocab_size=8, vocab_offset=VOCAB)
    config = tf.Gemma3nConfig(
        text_config={
            **decoder("gemma3n_text"), "vocab_size": size, "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 4, "altup_num_inputs": 4, "num_kv_shared_layers": 2, "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "final_logit_softcapping": 30.0,
        },
        audio_config={"vocab_size": size - VOCAB - 8, "vocab_offset": VOCAB + 8, "input_feat_size": 16,
                      "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
                      "conf_attention_chunk_size": 4, "conf_attention_context_left": 5,
                      "sscp_conv_channel_size": (4, 4)},
        vision_config=vision, audio_soft_tokens_per_image=30, audio_token_id=VOCAB + 9, image_token_id=VOCAB + 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    from_config = tf.AutoModel.from_config  # without its vision tower, which needs timm and torchvision
    with patch.object(
        tf.AutoModel, "from_config", lambda config: nn.Identity() if config is vision else from_config(config)
    ):
        model = tf.Gemma3nForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        mask = torch.ones(1, len(features), dtype=torch.bool)
        return 30, {"input_features": features[None], "input_features_mask": mask}

    return model, audio


def gemma4() -> Built:
    config = tf.Gemma4Config(
        text_config={
            **decoder("gemma4_text"), "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 2, "global_head_dim": 8, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        audio_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "attention_chunk_size": 4,
                      "subsampling_conv_channels": (16, 4), "attention_context_left": 5, "output_proj_dims": 16},
        vision_config={**ENCODER, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        audio_token_id=AUDIO, image_token_id=PAD, video_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.Gemma4ForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        inputs = {"input_features": features[None], "input_features_mask": torch.ones(1, len(features)).bool()}
        with torch.no_grad():
            return int(model.model.get_audio_features(**inputs).attention_mask.sum()), inputs

    return model, audio


def gemma4_unified() -> Built:
    config = tf.Gemma4UnifiedConfig(
        text_config={**decoder("gemma4_unified_text"), "global_head_dim": 8, "sliding_window": 16},
        audio_config={"audio_embed_dim": 16},
        vision_config={"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 16, "mm_posemb_size": 4,
                       "output_proj_dims": 16},
        audio_token_id=AUDIO, image_token_id=PAD, video_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.Gemma4UnifiedForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16, hop=640)
        n = len(features)
        return n, {"input_features": features[None], "input_features_mask": torch.ones(1, n).bool()}

    return model, audio


def nemotron_h_omni() -> Built:
    text = decoder("nemotron_h")
    del text["num_hidden_layers"]
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config={
            **text, "layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4,
            "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False,
        },
        audio_config={**ENCODER, "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 4,
                      "projection_hidden_size": 16, "projection_bias": False},
        vision_config={"model_type": "radio", **ENCODER, "image_size": 28, "patch_size": 14, "max_img_size": 28,
                       "video_temporal_patch_size": 2},
        vision_hidden_size=16, projector_hidden_size=16, audio_token_id=AUDIO, image_token_id=PAD, video_token_id=PAD,
    )  # fmt: skip
    return _counted(tf.NemotronH_Omni_Reasoning_V3(config), 120, transpose=False)


def inkling() -> Built:
    config = tf.InklingConfig(
        text_config={
            **decoder("inkling_text"), "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
            "sliding_window_size": 16, "d_rel": 4, "rel_extent": 32, "moe_intermediate_size": 16, "n_shared_experts": 1,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "local_layer_ids": [0],
            "mlp_layer_types": ["dense", "sparse"], "conv_kernel_size": 3,
        },
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 16, "text_hidden_size": HIDDEN},
        vision_config={"text_hidden_size": HIDDEN, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        audio_token_id=AUDIO, image_token_id=PAD, audio_bos_token_id=IDS["<|audio_bos|>"], image_bos_token_id=PAD,
    )  # fmt: skip
    model = tf.InklingForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        bins = (frames(wave, 4, hop=800) * 8 + 8).long().clamp(0, 15)
        mask = torch.ones(1, len(bins), dtype=torch.bool)
        return len(bins), {"audio_input_ids": bins[None], "audio_input_ids_mask": mask}

    return model, audio


def muse_spark() -> Built:
    config = tf.MuseSparkConfig(
        text_config={
            **decoder("muse_spark_text"), "sliding_window": 16, "moe_intermediate_size": 16, "moe_hidden_size": 16,
            "num_local_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"],
        },
        vision_config={**ENCODER, "pos_emb_height": 4, "pos_emb_width": 4},
        audio_config={"patch_sizes": (16, 16), "hidden_sizes": (8, 16), "depths": (1, 1), "num_hidden_layers": 2,
                      "conv_kernel_size": 3, "out_hidden_size": HIDDEN},
        out_hidden_size=HIDDEN, projector_hidden_size=16, audio_token_id=AUDIO, image_token_id=PAD, video_token_id=PAD,
    )  # fmt: skip
    model = tf.MuseSparkForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        n = -(-len(wave) // 256)
        samples = torch.zeros(1, n * 256)
        samples[0, : len(wave)] = torch.from_numpy(np.asarray(wave))
        return n, {"input_values": samples}

    return model, audio


def dots3_note() -> Built:
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
    config = tf.Dots3NoteConfig(
        text_config={
            **decoder("dots3_note_text"), **sizes, "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_experts_intermediate_size": 16,
            "index_topk": 512, "index_head_dim": 8, "index_n_heads": 2, "num_hidden_layers": 4, "sliding_window": 16,
            **{f"swa_{k}": v for k, v in sizes.items()}, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
            "swa_head_dim": 8,
        },
        audio_config={**ENCODER, "feature_size": 16, "downsample_hidden_size": 4, "adapter_input_size": 16,
                      "adapter_out_dim": HIDDEN},
        vision_config={**ENCODER, "adapter_in_dim": 16, "adapter_out_dim": HIDDEN, "mlp_layer_types": ["dense"]},
        audio_token_id=AUDIO, image_token_id=PAD, video_token_id=PAD,
    )  # fmt: skip
    model = tf.Dots3NoteForConditionalGeneration(config)

    def audio(wave: Any) -> tuple[int, dict[str, Any]]:
        features = frames(wave, 16)
        samples = len(features) * 160
        return -(-samples // 1280), {
            "input_features": features.T[None],
            "chunk_sample_lengths": torch.tensor([samples]),
        }

    return model, audio


_ALL = (
    qwen2_audio, qwen2_5_omni, qwen3_omni_moe, audioflamingo3, musicflamingo, voxtral, granite_speech,
    granite_speech_plus, phi4_multimodal, qwen3_asr, glmasr, fun_asr_nano, moss_transcribe_diarize, vibevoice_asr,
    gemma3n, gemma4, gemma4_unified, nemotron_h_omni, inkling, muse_spark, dots3_note,
)  # fmt: skip
ZOO: dict[str, Callable[[], Built]] = {build.__name__: build for build in _ALL}


def _lacking() -> dict[str, str]:
    """Name of a class -> why it can't be built here. These are facts about versions: no failure is looked at."""
    later = {
        "moss_transcribe_diarize": "MossTranscribeDiarizeConfig", "muse_spark": "MuseSparkConfig",
        "dots3_note": "Dots3NoteConfig",
    }  # fmt: skip
    ours = f"transformers {tf.__version__}"
    reasons = {name: f"{ours} has no {config}" for name, config in later.items() if not hasattr(tf, config)}
    since = NEEDS["VibeVoiceAsrForConditionalGeneration"]
    if Version(tf.__version__) < Version(since):
        reasons["vibevoice_asr"] = f"{ours} can't repeat what it hears, {since} can"
    wanted = tf.integrations.peft.MIN_PEFT_VERSION  # for a LoRA of the model's own
    if Version(peft.__version__) < Version(wanted):
        why = f"{ours} asks for PEFT {wanted}, installed is {peft.__version__}"
        reasons |= dict.fromkeys(("granite_speech", "granite_speech_plus"), why)
    return reasons


LACKING = _lacking()
NAMES = [pytest.param(name, marks=pytest.mark.skipif(name in LACKING, reason=LACKING.get(name, ""))) for name in ZOO]


def tiny(name: str, seed: int = 0) -> tuple[nn.Module, Callable[[str | None, Any], dict[str, Any]]]:
    """The model of a class, and its `build_inputs`."""
    torch.manual_seed(seed)
    model, audio = ZOO[name]()
    with torch.no_grad():  # initialisation draws tiny numbers; these make hidden states and logits of ordinary size
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    if hasattr(model, "generation_config"):
        model.generation_config.update(eos_token_id=END, pad_token_id=PAD)

    def build_inputs(text: str | None, wave: Any) -> dict[str, Any]:
        def encode(s: str) -> list[int]:
            return TOKENIZER(s, add_special_tokens=False)["input_ids"]

        ids, more = encode("<|im_start|>user\n"), {}
        if wave is not None:
            n, more = audio(wave)
            placeholder = getattr(model.config, "audio_token_id", None) or AUDIO  # Gemma 3n's: beyond text
            ids += [IDS["<|audio_bos|>"], *[placeholder] * n, IDS["<|audio_eos|>"]]
        ids += encode(f"{text or ''}<|im_end|>\n<|im_start|>assistant\n")
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **more}

    return model.eval(), build_inputs


def table() -> str:
    """What was measured on each class, as Markdown: one row a class, the three conditions each on two clips."""
    from conftest import rows

    from rrs import RRS, RRSConfig
    from rrs.data import load_examples
    from rrs.hooks import expert_parameters, linear_paths

    lines = [
        "| Class | Replay | Largest difference | Prefix shared | Batched answers | LoRA | Conditions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ZOO:
        if name in LACKING:
            lines.append(f"| {name} | not measured: {LACKING[name]} | | | | | |")
            continue
        model, build_inputs = tiny(name)
        rrs = RRS(model, TOKENIZER, RRSConfig(), build_inputs=build_inputs, verbose=False)
        worst, passed = 0.0, []
        for condition in ("audio-text", "text-only", "audio-only"):
            examples = load_examples(rows("harmful", 3))
            ours = rrs.reader.represent([rrs.read(e, condition) for e in examples])
            for e, row in zip(examples, ours, strict=True):
                text = {"audio-text": rrs.config.instruction, "text-only": e.text, "audio-only": None}[condition]
                audio = condition != "text-only"
                inputs = build_inputs(text, e.clip[1](16000) if audio else None)
                with rrs.reader.own_lora(audio), torch.no_grad():
                    true = rrs.reader._head_input(inputs)[0, -1]
                worst = max(worst, float((row - true).abs().max() / true.abs().max()))
            passed.append(condition)
        linears = {p.rpartition(".")[2]: None for p in linear_paths(rrs.location, rrs.config.target_modules)}
        experts = "; not the experts" if expert_parameters(rrs.location) else ""
        yes = {True: "yes", False: "no"}
        lines.append(
            f"| {type(model).__name__} | {'exact' if rrs.reader.exact else 'full model'} | {worst:.0e} "
            f"| {yes[rrs.reader.share_prefix]} | {yes[rrs.reader.from_embeddings]} "
            f"| {', '.join(linears)}{experts} | {', '.join(passed)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
