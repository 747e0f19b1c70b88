"""A model that is loaded in shards: what one machine's processes hold meanwhile is little more than what they keep."""

import json

import pytest
import torch

from tests.training.loading import __file__ as script
from tests.training.processes import run_ranks
from tests.training.test_parity import case

MIB = 2**20
FILE_MIB = 50
SLACK_MIB = 40
"""What two processes take besides: libraries' first use, threads, the sampler."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of 330 MiB in fp32, in several files. Its largest matrix is a 1/100 of it: a real one's is less."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=8192, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder, max_shard_size=f"{FILE_MIB}MB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, precision, processes", [("full", "fp32", 4), ("qlora", "fp32", 2), ("lora", "fp8", 2)]
)
def test_loading_holds_less_than_1_3_of_the_shards_and_a_file(method, precision, processes, checkpoint, tmp_path):
    settings = case("load", method, "fsdp", processes, precision=precision)
    settings |= {"model": str(checkpoint), "out": str(tmp_path / "found.json")}
    (tmp_path / "case.json").write_text(json.dumps(settings))
    done = run_ranks(script, "case.json", size=processes, folder=tmp_path, timeout_s=250, fork=False)
    assert done.codes == [0] * processes, done.output
    found = {name: size / MIB for name, size in json.loads((tmp_path / "found.json").read_text()).items()}
    assert found["held"] < 1.3 * found["shard"] + FILE_MIB + SLACK_MIB, found
    assert found["mapped"] < 2.2 * FILE_MIB + SLACK_MIB, found  # two files, of which no byte is this process's own
