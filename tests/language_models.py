"""Random language models small enough for a test, two layers each; hybrids have attention between two others."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cab.students.discrete_mamba2 import SUPPORTED

# Settings of a run on text that takes seconds.
TINY_RUN = [
    "device=cpu",
    "data.limit=30000",
    "data.held_out=0.4",
    "data.length=16",
    "data.test_tokens=200",
    "teacher.width=16",
    "teacher.depth=2",
    "teacher.heads=2",
    "teacher.key_heads=1",
    "teacher.steps=2",
    "student.width=16",
    "student.depth=2",
    "student.d_state=4",
    "bridge.hidden=8",
    "optim.steps=2",
    "optim.batch_size=4",
]

VOCABULARY = 48

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_STUDENTS = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "n_groups": 2, "num_heads": 4, "head_dim": 16, "chunk_size": 8},
    "discrete_mamba2": {
        "state_size": 4,
        "n_groups": 2,
        "num_heads": 4,
        "head_dim": 16,
        "intermediate_size": 40,
        "chunk_size": 8,
    },
    "bamba": {
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "mamba_d_state": 4,
        "mamba_n_groups": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
    },
}
_LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BLOOM = {"n_layer": 2, "n_head": 4}
_HEADED = {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 64}
_TEACHERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi", "phi3", "olmo2", "smollm3", "cohere", "granite"), _LLAMA),
    **dict.fromkeys(("stablelm", "starcoder2"), _LLAMA),
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text"), {**_LLAMA, "head_dim": 8}),
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "opt": {**_HEADED, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "gpt_neox": _HEADED,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "bloom": _BLOOM,
    "falcon": {"num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 40},
    "gpt_neox_japanese": {"num_attention_heads": 4, "intermediate_multiple_size": 1},
    "gpt_oss": {**_LLAMA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make(family: str, seed: int = 0, **kwargs: object) -> nn.Module:
    """A model of the family with its own random weights, in evaluation mode."""
    if family == "discrete_mamba2" and not SUPPORTED:
        pytest.skip("transformers is older than 5.24")
    torch.manual_seed(seed)
    sizes = {**_COMMON, **_TEACHERS.get(family, {}), **_STUDENTS.get(family, {}), **kwargs}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def checkpoint_blocks(model: nn.Module, **options: object) -> None:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)
