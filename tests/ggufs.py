"""GGUF files for tests: a checkpoint under the names, in the order of rows and with the settings of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

TYPES = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
CONTROL, NORMAL = 3, 1
SPECIAL = ("<s>", "</s>", "<pad>")
TEXTS = (
    "What is 3 plus 6? The answer is 9.",
    "Isn't it? We'll see 1234 of them",
    "a  12 345 b\n\n c",
    "Zürich, 水 and 🙂",
)
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def split_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with merges, splitting text as Qwen2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["What is the answer? The answer is what it is: seven, eleven and them. " * 8], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    fast.chat_template = TEMPLATE
    return fast


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def source(folder: Path, family: str, *, tied: bool = False, head_dim: int = 16) -> Path:
    """A random model of a family with that tokenizer, as an ordinary folder."""
    import torch

    tokenizer = split_tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family == "qwen2":
        del config.head_dim
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero would hide a mistake
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            # As it comes out of training in 16 bits.
            parameter.copy_(parameter.half().float())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(
    folder: Path,
    out: Path,
    kind: str = "f32",
    *,
    settings: dict[str, Any] | None = None,
    architecture: str | None = None,
    pre: str = "qwen2",
    extra: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The model of a folder as a GGUF file: matrices as `kind`, vectors in F32, as llama.cpp's converter leaves them.

    `settings` below the architecture replace and add; `extra` tensors are added, those of the names `without` left out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, family = model.config, model.config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(out, architecture or family)
    writer.add_name("A model of the tests")
    writer.add_license("apache-2.0")
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        **({"rope.dimension_count": head_dim} if family == "llama" else {}),
        **({"attention.key_length": head_dim, "attention.value_length": head_dim} if family != "qwen2" else {}),
        **(settings or {}),
    }
    for name, value in values.items():
        adding = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        adding[type(value)](f"{architecture or family}.{name}", value)
    _vocabulary(writer, folder, pre)
    names = get_tensor_name_map(next(k for k, v in MODEL_ARCH_NAMES.items() if v == family), config.num_hidden_layers)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        numbers = tensor.float().numpy()
        if family == "llama" and ".self_attn.q_proj" in name:
            numbers = _permuted(numbers, config.num_attention_heads)
        if family == "llama" and ".self_attn.k_proj" in name:
            numbers = _permuted(numbers, config.num_key_value_heads)
        if name not in without:
            _add(writer, f"{names.get_name(stem)}.{suffix}", numbers, kind if numbers.ndim > 1 else "f32")
    for name, numbers in (extra or {}).items():
        _add(writer, name, numbers, "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add(writer: GGUFWriter, name: str, numbers: np.ndarray, kind: str) -> None:
    stored = quantize(np.ascontiguousarray(numbers), TYPES[kind])
    writer.add_tensor(name, stored, raw_dtype=TYPES[kind])


def _permuted(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp turns them: convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
        .swapaxes(1, 2)
        .reshape(numbers.shape)
    )


def _vocabulary(writer: GGUFWriter, folder: Path, pre: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
