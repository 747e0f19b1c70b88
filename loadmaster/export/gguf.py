"""One GGUF file for llama.cpp and Ollama from a bf16 folder, by the `gguf` package's own writer.

Streamed: the header has every tensor's shape first, then each tensor is read, converted and written by itself.

What the file needs besides names (the package knows those):

- llama.cpp rotates neighbouring pairs of a head's values, transformers its two halves. For the Llama family (and
  Mistral, which llama.cpp runs as one) the rows of the query and key projections are reordered; Qwen's are not, since
  llama.cpp has the other rotation for it.
- Llama 3.1's stretched rotation is a tensor of one divisor a frequency, `rope_freqs.weight`.
- Norms, biases and other vectors stay in float32; matrices whose rows are no multiple of 32 stay in 16 bits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadmaster.errors import ExportRejected
from loadmaster.export.gguf_tokenizer import add_tokenizer, pre_tokenizer
from loadmaster.export.stream import ShardWriter, row_chunks
from loadmaster.export.weights import read_tensor, shards, tensor_shapes
from loadmaster.files import read_json, write_json, write_text
from loadmaster.model_files import SINGLE
from loadmaster.preflight.exports import GGUF_ARCHITECTURES as ARCHITECTURES

PERMUTED = ("llama",)
Q8_0_BLOCK = 32


def export_gguf(
    source: Path, target: Path, name: str, kind: str, stop_token_ids: list[int], read_back: str
) -> dict[str, Any]:
    """Write target/<name>-<kind>.gguf from the model in `source`, and an Ollama Modelfile beside it.

    name: of the model; a slash in it (recipe=team/mine) is a dash in the file's. kind: q8_0, bf16 or f16.
    read_back: folder for the tensors as transformers reads them from the file, to be verified.
    Raises ExportRejected for a rotation or tokenizer that it cannot describe rightly.
    """
    from loadmaster.models.tokenizer import load_tokenizer

    config = read_json(source / "config.json")
    refuse_unwritable(source, config)
    file = target / f"{name.replace('/', '-')}-{kind}.gguf"
    write_gguf(source, file, config, name, kind, stop_token_ids)
    texts = load_tokenizer(source).convert_ids_to_tokens(stop_token_ids)
    stops = "".join(f'PARAMETER stop "{text}"\n' for text in texts)
    write_text(target / "Modelfile", f"FROM ./{file.name}\nPARAMETER num_ctx {min(_context(config), 8192)}\n{stops}")
    _read_back(file, source, Path(read_back))
    return {
        "file": file.name,
        "type": kind,
        "architecture": ARCHITECTURES[config["model_type"]],
        "read_from": read_back,
    }


def refuse_unwritable(source: Path, config: dict[str, Any]) -> None:
    """Raises ExportRejected for an architecture, a rotation or a tokenizer that a GGUF cannot describe rightly."""
    if (model_type := config.get("model_type", "unknown")) not in ARCHITECTURES:
        raise ExportRejected(
            f"gguf is written for {', '.join(ARCHITECTURES)}, not for {model_type}. Take it from export.formats, and "
            "convert the bf16 export with llama.cpp's convert_hf_to_gguf.py."
        )
    kind = _rope(config)[0]
    if kind not in ("default", "llama3", "linear"):  # yarn has fields, but llama.cpp's is off by a KL of 0.003 nats
        raise ExportRejected(f"gguf cannot hold this model's rotation ({kind}) exactly: take it from export.formats.")
    if (source / "tokenizer.json").is_file():
        pre_tokenizer(read_json(source / "tokenizer.json"))


def _rope(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(kind of rotation, its settings)"""
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
    return rope.get("rope_type", rope.get("type", "default")), rope


def write_gguf(
    source: Path, file: Path, config: dict[str, Any], name: str, kind: str, stop_token_ids: list[int]
) -> None:
    import gguf

    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_file_type({"q8_0": 7, "bf16": 32, "f16": 1}[kind])  # ggml's LLAMA_FTYPE_MOSTLY_*
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    divisors = _add_shape(writer, config)
    add_tokenizer(writer, source, config["vocab_size"], stop_token_ids)
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], config["num_hidden_layers"]
    )
    plan = []
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for shard in shards(source):
        for tensor, (_, shape) in tensor_shapes(shard).items():
            mapped = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
            if mapped is None:
                raise ExportRejected(f"llama.cpp has no place for {tensor}: this model cannot be written as gguf.")
            stored = _stored_as(shape, kind, gguf.GGMLQuantizationType)
            stored_shape = gguf.quant_shape_to_byte_shape(shape, stored)
            is_bytes = stored.name in ("Q8_0", "BF16")
            dtype = np.dtype(np.uint8 if is_bytes else np.float16 if stored.name == "F16" else np.float32)
            size = math.prod(stored_shape) if is_bytes else math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(mapped, stored_shape if is_bytes else shape, dtype, size, stored)
            plan.append((shard, tensor, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    for shard, tensor, stored in plan:
        weight = _reordered(tensor, read_tensor(shard, tensor), config)
        writer.write_tensor_data(_converted(weight, stored))
    writer.close()


def _add_shape(writer: Any, config: dict[str, Any]) -> np.ndarray | None:
    """Fields of config.json in llama.cpp's terms; returns the divisors of its rotation's frequencies, where it has."""
    import gguf

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(_context(config))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    kind, rope = _rope(config)
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_rope_freq_base(base)
    if kind == "llama3":
        return llama3_divisors(rope, base, head_dim)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return None


def _context(config: dict[str, Any]) -> int:
    """Longest sequence. llama.cpp's Llama has no attention window, so a Mistral with one ends where it would begin."""
    windowed = config["model_type"] == "mistral" or config.get("use_sliding_window")
    window = (config.get("sliding_window") if windowed else None) or config["max_position_embeddings"]
    return min(window, config["max_position_embeddings"])


def llama3_divisors(rope: dict[str, Any], base: float, head_dim: int) -> np.ndarray:
    """[head_dim / 2] float32: what Llama 3.1 divides each frequency by.

    Wavelengths (2 pi base^(2i/d)) below L / high_freq_factor stay, those above L / low_freq_factor are stretched by
    `factor`, and between them the frequency is blended linearly in L / wavelength. L is the original context.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    share = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    share = np.clip(share, 0.0, 1.0)  # of the unchanged frequency
    return (1.0 / (share + (1.0 - share) / factor)).astype(np.float32)


def _stored_as(shape: tuple[int, ...], kind: str, types: Any) -> Any:
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % Q8_0_BLOCK:
        return types.F16
    return types[kind.upper()]


def _reordered(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Query and key projections with the two halves of each head interleaved, where llama.cpp rotates pairs."""
    if ARCHITECTURES[config["model_type"]] not in PERMUTED:
        return weight
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _converted(weight: torch.Tensor, stored: Any) -> np.ndarray:
    from gguf import quants

    if weight.dim() == 1:
        return weight.float().numpy()
    if stored.name == "BF16":
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return np.concatenate(
        [quants.quantize(weight[rows].float().numpy(), stored) for rows in row_chunks(tuple(weight.shape))]
    )


def _read_back(file: Path, source: Path, target: Path) -> None:
    """The file's tensors, read by transformers' GGUF loader, as a bf16 folder with the source's config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = read_json(source / "config.json")
    # To transformers too a Mistral is a Llama in this format.
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    model, info = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=str(file.absolute()),  # a bare name is looked for in the working directory first
        config=AutoConfig.for_model(ARCHITECTURES[config["model_type"]], **fields), dtype=torch.bfloat16,
        output_loading_info=True, quantization_config=GgufConfig(dequantize=True),
    )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if loose := set(map(str, {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})) - tied:
        raise ExportRejected(f"{file.name} does not fill the model: {', '.join(sorted(loose)[:3])}")
    target.mkdir()
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    writer = ShardWriter(target / SINGLE, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    write_json(target / "config.json", config)
