"""The families of models as data: every key of their config.json that we know, and what we do not support, by name.

A key is in exactly one of these tables or is refused, since it could change the function that the model computes.
"""

from collections.abc import Mapping
from typing import Literal, get_args

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "bert"]
"""`model_type` of config.json."""
FAMILIES: tuple[Family, ...] = get_args(Family)

_ROTARY: dict[str, object] = {
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
}
_DECODER: dict[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
} | _ROTARY
_QWEN: dict[str, object] = _DECODER | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "eos_token_id": None,
}
_GEMMA: dict[str, object] = _ROTARY | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "eos_token_id": 1,
}
DEFAULTS: Mapping[Family, Mapping[str, object]] = {
    "llama": _DECODER
    | {
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    },
    "mistral": _DECODER
    | {
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "gemma2": _GEMMA
    | {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "rope_local_base_freq": None,
        "sliding_window_pattern": 6,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "eos_token_id": 50_256,
    },
    "bert": {
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "eos_token_id": None,
    },
}
"""The keys that say what a family's model computes, with the values that an absent one has in transformers' Config."""

_OF_TOKENS = ("bos", "pad", "sep", "cls", "mask", "unk", "decoder_start", "forced_bos", "forced_eos")
_OF_GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "task_specific_params", "cache_implementation", "use_cache", "max_new_tokens"),
)
_OF_LIBRARIES = (
    *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path"),
    *("_commit_hash", "dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "tokenizer_class"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_experts_implementation"),
    *("_output_attentions", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("keys_to_ignore_at_inference", "transformers.js_config", "unsloth_version", "unsloth_fixed", "prefix"),
)
_OF_TRAINING = (
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "initializer_range"),
    *("gradient_checkpointing", "attention_dropout", "classifier_dropout", "tie_encoder_decoder"),
)
_EVERYWHERE = (*(f"{name}_token_id" for name in _OF_TOKENS), *_OF_GENERATION, *_OF_LIBRARIES, *_OF_TRAINING)
_OF_FAMILY: Mapping[Family, tuple[str, ...]] = {
    # pretraining_tp only splits the same sums; is_decoder of a decoder is no choice
    "llama": ("pretraining_tp", "is_llama_config", "max_sequence_length", "is_decoder"),
    "mistral": ("is_decoder",),
    "qwen2": ("is_decoder",),
    "qwen3": ("is_decoder",),
    "gemma2": ("is_decoder",),
    "gemma3_text": ("is_decoder", "_sliding_window_pattern"),  # saved beside layer_types, and then of no effect
    "gpt2": (
        *("is_decoder", "n_ctx", "embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    "bert": (
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_fc_size", "pooler_num_attention_heads"),
        *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality", "tie_word_embeddings"),
    ),
}
IGNORED: Mapping[Family, frozenset[str]] = {family: frozenset(_EVERYWHERE + _OF_FAMILY[family]) for family in FAMILIES}
"""Keys without effect on what a model computes from tokens."""

_EXPERTS = "mixtures of experts are not supported"
_LATENT = "latent attention (MLA) is not supported"
_SINKS = "attention sinks are not supported"
_CROSS = "only models of one stack are supported, without attention to another one"
OFF: Mapping[str, str] = {
    "quantization_config": "quantised weights are not supported: fp32, fp16 and bf16 are",
    "compression_config": "quantised weights are not supported: fp32, fp16 and bf16 are",
    **{key: _EXPERTS for key in ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts")},
    **{key: _EXPERTS for key in ("num_experts_per_tok", "moe_intermediate_size", "moe_num_experts", "mlp_layer_types")},
    **{key: _LATENT for key in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")},
    **{key: _SINKS for key in ("attention_sinks", "attention_sink", "attn_sinks", "add_attention_sink")},
    **{key: _CROSS for key in ("is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size")},
    "pruned_heads": "all layers have the same heads here",
    "per_layer_config": "all layers have the same sizes here",
    "text_config": "only text models are supported: save the text model on its own",
    "vision_config": "only text models are supported: save the text model on its own",
    "use_bidirectional_attention": "this family is supported as a decoder only",
    "use_mrope": "rotary positions of several dimensions (M-RoPE) are not supported",
    "rope_interleaved": "rotary positions are those of Hugging Face, pairs half a head apart",
}
"""Keys of what is not supported; they may be there switched off: null, false, 0, empty."""
OFF_IN: Mapping[Family, Mapping[str, str]] = {
    "bert": {"is_decoder": "BERT is supported as an encoder only"},
    "mistral": {"attention_bias": "Mistral has no biases in transformers"},
    "gemma3_text": {
        "attn_logit_softcapping": "transformers does not cap the scores of Gemma 3, whatever this key says"
    },
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": "scores with a factor of their own in each layer are not supported",
        "reorder_and_upcast_attn": "attention in another precision than the rest is not supported",
    },
}
SAME: Mapping[Family, Mapping[str, str]] = {
    "gemma2": {"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
}
"""Keys that transformers does not look at, and the keys that it does, whose values they must have."""

NOT_SUPPORTED: Mapping[str, str] = {
    "gemma3": "it is multimodal; of its text model alone the model_type is gemma3_text",
    **{name: _EXPERTS for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "dbrx")},
    **{name: f"{_LATENT}, nor are experts" for name in ("deepseek_v2", "deepseek_v3", "kimi_k2")},
    "minicpm3": _LATENT,
    "gpt_oss": f"{_SINKS}, nor are experts",
    **{name: "models of an encoder and a decoder are not supported" for name in ("t5", "bart", "mbart", "whisper")},
}
"""Why a model_type that one may well try is refused."""
