"""Real models of ``transformers``, on the meta device: default widths, few layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LAYERS = {"num_hidden_layers": 2}
BOTH = {"text_config": LAYERS, "vision_config": LAYERS}
CODERS = {"encoder_layers": 2, "decoder_layers": 2}

#: By the class that a config's "architectures" names: its model type, and what is written in the config.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", LAYERS),
    "LlamaForSequenceClassification": ("llama", LAYERS),
    "MistralForCausalLM": ("mistral", LAYERS),
    "Qwen2ForCausalLM": ("qwen2", LAYERS),
    "Qwen3ForCausalLM": ("qwen3", LAYERS),
    "GemmaForCausalLM": ("gemma", LAYERS),
    "Gemma2ForCausalLM": ("gemma2", LAYERS),
    "Gemma3ForCausalLM": ("gemma3_text", LAYERS),
    "Gemma3ForConditionalGeneration": ("gemma3", BOTH),
    "PhiForCausalLM": ("phi", LAYERS),
    "Phi3ForCausalLM": ("phi3", LAYERS),
    "Olmo2ForCausalLM": ("olmo2", LAYERS),
    "CohereForCausalLM": ("cohere", {**LAYERS, "use_qk_norm": True}),
    "StableLmForCausalLM": ("stablelm", LAYERS),
    "GraniteForCausalLM": ("granite", LAYERS),
    "GPT2LMHeadModel": ("gpt2", {"n_layer": 2}),
    "GPTNeoXForCausalLM": ("gpt_neox", LAYERS),
    "GPTJForCausalLM": ("gptj", {"n_layer": 2}),
    "GPTBigCodeForCausalLM": ("gpt_bigcode", {"n_layer": 2}),
    "OPTForCausalLM": ("opt", LAYERS),
    "BloomForCausalLM": ("bloom", {"n_layer": 2}),
    "MptForCausalLM": ("mpt", {"n_layers": 2}),
    "FalconForCausalLM": ("falcon", LAYERS),
    "XGLMForCausalLM": ("xglm", {"num_layers": 2}),
    "MixtralForCausalLM": ("mixtral", LAYERS),
    "Qwen3MoeForCausalLM": ("qwen3_moe", LAYERS),
    "OlmoeForCausalLM": ("olmoe", LAYERS),
    "GptOssForCausalLM": ("gpt_oss", LAYERS),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {**LAYERS, "first_k_dense_replace": 1}),
    "MambaForCausalLM": ("mamba", LAYERS),
    "Mamba2ForCausalLM": ("mamba2", LAYERS),
    "FalconMambaForCausalLM": ("falcon_mamba", LAYERS),
    "RwkvForCausalLM": ("rwkv", LAYERS),
    "RecurrentGemmaForCausalLM": ("recurrent_gemma", {"num_hidden_layers": 3}),
    "JambaForCausalLM": ("jamba", {"num_hidden_layers": 5}),
    "BertForMaskedLM": ("bert", LAYERS),
    "BertForSequenceClassification": ("bert", LAYERS),
    "RobertaForSequenceClassification": ("roberta", LAYERS),
    "DistilBertForMaskedLM": ("distilbert", {"n_layers": 2}),
    "AlbertForMaskedLM": ("albert", LAYERS),
    "XLNetLMHeadModel": ("xlnet", {"n_layer": 2}),
    "T5ForConditionalGeneration": ("t5", {"num_layers": 2}),
    "BartForConditionalGeneration": ("bart", CODERS),
    "WhisperForConditionalGeneration": ("whisper", CODERS),
    "ViTForImageClassification": ("vit", LAYERS),
    "SwinForImageClassification": ("swin", {"depths": [1, 1], "num_heads": [3, 6]}),
    "ConvNextForImageClassification": ("convnext", {"depths": [1, 1, 1, 1]}),
    "Wav2Vec2ForCTC": ("wav2vec2", LAYERS),
    "CLIPModel": ("clip", BOTH),
    "LlavaForConditionalGeneration": ("llava", BOTH),
    "MllamaForConditionalGeneration": (
        "mllama",
        {
            "text_config": {**LAYERS, "cross_attention_layers": [1], "pad_token_id": 0},
            "vision_config": {**LAYERS, "num_global_layers": 1, "intermediate_layers_indices": [0]},
        },
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {"text_config": {**LAYERS, "pad_token_id": 0}, "vision_config": LAYERS},
    ),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", {"text_config": LAYERS, "vision_config": {"depth": 2}}),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", {"text_config": LAYERS, "vision_config": {"depth": 2}}),
}


def config_of(name: str, **changed: Any) -> dict[str, Any]:
    """The content of a ``config.json``."""
    kind, written = ZOO[name]
    return {"model_type": kind, "architectures": [name], **written, **changed}


def model_of(name: str) -> nn.Module:
    """The model itself, by its class."""
    import transformers

    kind, written = ZOO[name]
    config = transformers.CONFIG_MAPPING[kind](**written)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(config)
    return model
