"""Small real checkpoints for the tests: made by transformers and peft themselves, random but
seeded.

Each builder saves with `save_pretrained` into `path` and returns it, so that what is read back is
what users bring. Every family's tiny model has a vocabulary of VOCABULARY tokens, like the tiny
tokenizer.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from bench.variants import randomize

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "A block is the longest run of units that all chains using it use whole.",
    "Grüße aus Köln: naïve café, 12,50 €, 日本語 and emoji 🙂 too.",
]


def tiny_tokenizer(path: Path) -> Path:
    """A byte-level BPE tokenizer of VOCABULARY tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(path)
    return path


def tiny_llama(path: Path, seed: int = 0, **config: object) -> Path:
    """Four layers, grouped heads, untied head unless asked otherwise."""
    settings = _common() | {"num_key_value_heads": 2} | config
    return _save(LlamaForCausalLM, LlamaConfig(**settings), path, seed)


def tiny_qwen2(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with biases on q, k and v."""
    settings = _common() | {"num_key_value_heads": 2} | config
    return _save(Qwen2ForCausalLM, Qwen2Config(**settings), path, seed)


def tiny_qwen3(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with norms on q and k and heads wider than hidden / heads."""
    settings = _common() | {"num_key_value_heads": 2, "head_dim": 24} | config
    return _save(Qwen3ForCausalLM, Qwen3Config(**settings), path, seed)


def tiny_mistral(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with a window of 16 positions and heads wider than hidden / heads."""
    settings = _common() | {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 16} | config
    return _save(MistralForCausalLM, MistralConfig(**settings), path, seed)


def tiny_phi3(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with fused matrices, a window and heads of which three quarters turn."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    own = {"num_key_value_heads": 2, "sliding_window": 24, "rope_parameters": rope}
    return _save(Phi3ForCausalLM, Phi3Config(**(_common() | own | config)), path, seed)


def tiny_gemma3(path: Path, seed: int = 0, **config: object) -> Path:
    """Four layers, every second with a window of 16 positions, tied head."""
    settings = _common() | {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "query_pre_attn_scalar": 20,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    }
    return _save(Gemma3ForCausalLM, Gemma3TextConfig(**(settings | config)), path, seed)


def tiny_gpt_neox(path: Path, seed: int = 0, **config: object) -> Path:
    """Four layers, heads of which a quarter turns, untied head."""
    return _save(GPTNeoXForCausalLM, GPTNeoXConfig(**(_common() | config)), path, seed)


def tiny_gpt2(path: Path, seed: int = 0, **config: object) -> Path:
    """Four layers, learned positions, tied head."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 2,
    } | config
    return _save(GPT2LMHeadModel, GPT2Config(**settings), path, seed)


def tiny_olmo2(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with norms behind both halves and over all of q and k."""
    settings = _common() | {"num_key_value_heads": 2} | config
    return _save(Olmo2ForCausalLM, Olmo2Config(**settings), path, seed)


def tiny_falcon(path: Path, seed: int = 0, **config: object) -> Path:
    """Four layers, attention and MLP side by side, one head of keys and values, tied head."""
    settings = _common() | {"ffn_hidden_size": 128, "tie_word_embeddings": True} | config
    return _save(FalconForCausalLM, FalconConfig(**settings), path, seed)


def tiny_falcon_new(path: Path, seed: int = 0, **config: object) -> Path:
    """`tiny_falcon` as the larger ones are: grouped heads, a norm for each half."""
    return tiny_falcon(path, seed, new_decoder_architecture=True, num_kv_heads=2, **config)


def tiny_falcon_old(path: Path, seed: int = 0, **config: object) -> Path:
    """`tiny_falcon` as the smallest ones are: one half after the other, biases, all heads."""
    return tiny_falcon(path, seed, multi_query=False, parallel_attn=False, bias=True, **config)


def tiny_stablelm(path: Path, seed: int = 0, **config: object) -> Path:
    """Like `tiny_llama`, with layer norms and heads of which a quarter turns."""
    settings = _common() | {"num_key_value_heads": 2} | config
    return _save(StableLmForCausalLM, StableLmConfig(**settings), path, seed)


def tiny_stablelm_parallel(path: Path, seed: int = 0, **config: object) -> Path:
    """`tiny_stablelm` with halves side by side, biases on q, k and v, a norm for each head."""
    own = {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}
    return tiny_stablelm(path, seed, **(own | config))


def tiny_model(path: Path, kind: str, seed: int = 0, **config: object) -> Path:
    """A tiny model of any type that transformers knows."""
    chosen = AutoConfig.for_model(kind, **(_common() | config))
    return _save(MODEL_FOR_CAUSAL_LM_MAPPING[type(chosen)], chosen, path, seed)


def tiny_config(path: Path, kind: str, **config: object) -> Path:
    """A folder with nothing but the config of a tiny model of any type."""
    AutoConfig.for_model(kind, **(_common() | config)).save_pretrained(path)
    return path


def tiny_lora(
    path: Path,
    base: Path,
    rank: int = 4,
    alpha: float = 8,
    targets: Iterable[str] | str = ("q_proj", "v_proj"),
    seed: int = 0,
    **config: object,
) -> Path:
    """A LoRA adapter for the checkpoint at `base`, with random A and B so that it does something.

    `config` goes to peft's LoraConfig, but for `dtype`, which the adapter's tensors are saved in.
    """
    from peft import LoraConfig, get_peft_model

    dtype = config.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    chosen = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM", **config
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft calls a deprecated attribute of transformers and asks the hub about the base.
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, lora)
        randomize(tuned, seed)
        tuned.to(dtype).save_pretrained(path)
    return path


def fine_tune(
    path: Path, base: Path, tensors: Iterable[str], seed: int = 1, scale: float = 0.02
) -> Path:
    """A copy of `base` in which the tensors whose names contain one of `tensors` have moved a
    little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    wanted = list(tensors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in wanted):
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
    model.save_pretrained(path)
    return path


def _common() -> Mapping[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }


def _save(kind: type[PreTrainedModel], config: PreTrainedConfig, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.mul_(4)
    dtype = getattr(config, "dtype", None)
    model.to(dtype or torch.float32).save_pretrained(path)
    tiny_tokenizer(path)
    return path


def tiny_gguf(path: Path, checkpoint: Path) -> Path:
    """The Llama checkpoint at `checkpoint` as a float32 .gguf file, as llama.cpp lays it out."""
    import gguf
    from transformers import AutoTokenizer

    model = LlamaForCausalLM.from_pretrained(checkpoint)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in SPECIAL else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        packed = tensor
        for letter, count in heads.items():
            if f"{letter}_proj" in name:
                packed = tensor.view(count, 2, -1, tensor.shape[1]).swapaxes(1, 2)
        short = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(short, packed.reshape(tensor.shape).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
