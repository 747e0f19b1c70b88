from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter, save_tiny_llama

from loadmaster.errors import ExportRejected
from loadmaster.export.adapter import read_adapter
from loadmaster.export.fp8 import Fp8, Fp8Block
from loadmaster.export.int4 import Int4, group_size
from loadmaster.export.linear import QuantizeLinears, linear_weights, quantization_config
from loadmaster.export.merge import merge
from loadmaster.export.stream import ShardWriter, Unchanged, rewrite
from loadmaster.export.weights import DTYPES, shards, tensor_shapes
from loadmaster.files import read_json, write_json
from loadmaster.model_files import INDEX

LLM_COMPRESSOR = """
import sys, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

base, out, group = sys.argv[1:4]
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipes = {
    "fp8": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
    "int4-rtn": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}},
    "fp8_block": {"targets": "Linear", "scheme": "FP8_BLOCK"},
}
for name in sys.argv[4:] or recipes:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **recipes[name]))
    model.save_pretrained(f"{out}/{name}")
"""
PEAK = """
import resource, sys
from pathlib import Path
from loadmaster.export.fp8 import Fp8
from loadmaster.export.linear import QuantizeLinears, linear_weights
from loadmaster.export.stream import Unchanged, rewrite

source, *targets = map(Path, sys.argv[1:])
names = linear_weights(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rewrite(source, Unchanged(), {targets[0]: Unchanged(), targets[1]: QuantizeLinears(Fp8(), names, "fp8")})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def child(code: str, *arguments: object) -> str:
    """Output of Python code run by itself, with this process's way of finding loadmaster."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def same_bits(folder, other) -> None:
    """Every tensor of both folders has the same name, dtype, shape and bits."""
    mine, theirs = (
        {name: tensor for shard in shards(each) for name, tensor in load_file(shard).items()}
        for each in (folder, other)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), name


def stream_as_llm_compressor_does(base, tmp_path, quantizers) -> None:
    names = linear_weights(base)
    group = group_size(shape[1] for shape in names.values())
    child(LLM_COMPRESSOR, base, tmp_path, group, *quantizers)
    for name, make in quantizers.items():
        quantizer = make(group)
        ours = tmp_path / f"streamed-{name}"
        ours.mkdir()
        rewrite(base, Unchanged(), {ours: QuantizeLinears(quantizer, names, name)})
        same_bits(ours, tmp_path / name)
        assert quantization_config(quantizer) == read_json(tmp_path / name / "config.json")["quantization_config"]


QUANTIZERS = {"fp8": lambda group: Fp8(), "int4-rtn": Int4, "fp8_block": lambda group: Fp8Block()}


@pytest.fixture(scope="module")
def divisible(tmp_path_factory, tokenizer):
    """Every matrix has dimensions that 128 divides; one row and one group are zero, one weight is huge."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    folder = save_tiny_llama(tmp_path_factory.mktemp("divisible"), tokenizer, **shape)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    gate[3] = 0
    gate[128:256] = 0
    gate[5, 7] = 300.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_streamed_weights_and_config_are_bit_for_bit_those_of_llm_compressor(divisible, tmp_path):
    stream_as_llm_compressor_does(divisible, tmp_path, QUANTIZERS)


@pytest.mark.slow
def test_streamed_weights_of_the_real_model_are_bit_for_bit_those_of_llm_compressor(smollm2, tmp_path):
    quantizers = {name: QUANTIZERS[name] for name in ("fp8", "int4-rtn")}  # 576 is no multiple of 128
    stream_as_llm_compressor_does(smollm2, tmp_path, quantizers)


def test_what_is_quantized_while_it_is_merged_equals_what_is_quantized_afterwards(divisible, tmp_path):
    adapter = read_adapter(save_adapter(divisible, tmp_path / "adapter"))
    names = linear_weights(divisible)
    folders = [tmp_path / name for name in ("bf16", "fused", "alone", "after")]
    for folder in folders:
        folder.mkdir()
    bf16, fused, alone, after = folders
    quantize = QuantizeLinears(Fp8(), names, "fp8")
    merge(divisible, bf16, adapter, torch.bfloat16, None, {fused: quantize})
    merge(divisible, None, adapter, torch.bfloat16, None, {alone: quantize})
    rewrite(bf16, Unchanged(), {after: quantize})
    same_bits(fused, after)
    same_bits(alone, after)


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    tensors = {f"{index}.{name}": torch.arange(3).to(dtype) for index, (name, dtype) in enumerate(DTYPES.items())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "odd": torch.zeros(3, 5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path / "ours", tensor_shapes(tmp_path / "theirs"))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_is_missing_or_other_than_announced_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))})
    with pytest.raises(ValueError, match="its header says"):
        writer.write("a", torch.zeros(3))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="1 tensors were not written"):
        writer.close()


def test_shards_get_an_index_of_what_they_hold_now(divisible, tokenizer, tmp_path):
    sharded = save_tiny_llama(tmp_path / "sharded", tokenizer, max_shard_size="200KB")
    target = tmp_path / "fp8"
    target.mkdir()
    rewrite(sharded, Unchanged(), {target: QuantizeLinears(Fp8(), linear_weights(sharded), "fp8")})
    index = read_json(target / INDEX)
    held = {name: shard.name for shard in shards(target) for name in tensor_shapes(shard)}
    assert index["weight_map"] == held and len(set(held.values())) > 1
    sizes = [tensor.numel() * tensor.element_size() for shard in shards(target) for tensor in load_file(shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_memory_is_that_of_a_tensor_although_all_lie_in_one_file(tmp_path):
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(10)]
    save_file({name: torch.zeros(4096, 4096, dtype=torch.bfloat16) for name in names}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    targets = [tmp_path / "bf16", tmp_path / "fp8"]
    for target in targets:
        target.mkdir()
    growth_mib = float(child(PEAK, tmp_path, *targets))
    assert (targets[1] / "model.safetensors").stat().st_size > 10 * 4096 * 4096
    assert growth_mib < 150  # of 320 MiB read and 480 MiB written; a tensor is 32 MiB


FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 32}, "phi3": {"pad_token_id": 0},
    "gemma2": {"head_dim": 32}, "gemma3_text": {"head_dim": 32}, "gpt_neox": {},
    "gemma4_text": {"head_dim": 32, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
}
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 128,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_found_by_name_are_those_of_the_model_class(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))
    model.save_pretrained(tmp_path)
    head = model.get_output_embeddings()
    expected = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    assert linear_weights(tmp_path) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_weights_that_would_be_left_unquantized_in_silence_are_an_error(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"n_embd": 64, "n_head": 2, "n_layer": 1, "vocab_size": 128} if family == "gpt2" else SMALL
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small)).save_pretrained(tmp_path)
    with pytest.raises(ExportRejected, match=r"(only \d+% of this model's weights|Conv1D).*export\.formats=\[bf16\]"):
        linear_weights(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ([4096, 14336], 128),  # Llama 3.1 8B
        ([576, 1536], 64),  # SmolLM2-135M: 576 = 9 x 64, 1536 = 12 x 128
        ([1536], 128),
        ([576], 64),
        ([960, 2560], 64),  # SmolLM2-360M
        ([96, 256], 32),
    ],
)
def test_the_largest_group_that_divides_every_layer_is_taken(inputs, size):
    assert group_size(inputs) == size


def test_a_model_that_no_group_divides_is_refused_with_its_layers_named():
    with pytest.raises(ExportRejected, match=r"\[100\].*export\.formats"):
        group_size([4096, 100])


def test_blocks_that_do_not_divide_are_refused_with_the_tensor_named(tiny):
    with pytest.raises(ExportRejected, match=r"fp8_block .*proj\.weight \[.*is not a multiple of 128.*formats=\[fp8\]"):
        QuantizeLinears(Fp8Block(), linear_weights(tiny), "fp8_block")


def test_no_two_configs_share_a_part():
    config = quantization_config(Fp8())
    config["config_groups"]["group_0"]["weights"]["observer_kwargs"]["changed"] = True
    assert "changed" not in json.dumps(quantization_config(Fp8()))
