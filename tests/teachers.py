"""Tiny stacked models of every family that can be looped, a tokenizer for them, and checkpoint folders of both."""

from pathlib import Path
from typing import Any

import torch
from helpers import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}

#: Name -> model type and settings; between them every field that a family's table translates takes two values.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-wide-heads": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama-linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    "olmo2-biases": ("olmo2", {"attention_bias": True}),
}


def tiny_teacher(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A randomised six-layer model, 32 wide, with logits of order one, in evaluation mode."""
    model_type, settings = TEACHERS[name]
    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": dict(ROPE),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**common, **settings, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return randomise(teacher, std=1.0).eval()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer(**special_tokens: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens with a chat template: 0 `<pad>`, 1 `<|start|>`, 2 `<|end|>`, 3 `<eos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<|start|>", "<|end|>", "<eos>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the other cat sat there too"], trainer)
    chosen = {"pad_token": "<pad>", "bos_token": "<|start|>", "eos_token": "<|end|>", **special_tokens}
    chosen["extra_special_tokens"] = ["<pad>", "<|start|>", "<|end|>", "<eos>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **chosen)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_teacher(folder: Path, name: str = "llama", **overrides: Any) -> PreTrainedModel:
    """Write a checkpoint folder with a tiny model and tokenizer, and return the model."""
    teacher = tiny_teacher(name, vocab_size=300, **overrides)
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return teacher
