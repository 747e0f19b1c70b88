"""The simulated allocator against six runs that were measured on an H100: what it reserved, and what it says.

    python benchmarks/reserved_measured.py            # ten minutes of one core, and a C++ compiler for a minute

The runs are transformers' own: Llama 3.2 1B and 3.1 8B, LoRA of rank 16 on all linears by peft, one row of 4,096
tokens, its default loss, AdamW (foreach), three steps; peaks are counted from before the first. They are run again with
fake tensors on `cuda`, which the stand-in of tests/stand_in makes possible without a GPU, and every allocation goes to
the simulated allocator (caching_allocator.py).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
TOKENS = 4096
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Run:
    model: str
    checkpointed: bool
    wide: bool
    """Adapters in fp32, under autocast."""
    allocated: float
    reserved: float
    """GiB, measured on one H100 80GB HBM3 with torch 2.11 and CUDA 13.0 on 2026-11-23."""


RUNS = [
    Run("1B", False, True, 16.510, 16.803),
    Run("1B", True, True, 9.623, 10.066),
    Run("8B", True, True, 23.403, 24.824),
    Run("8B", False, True, 48.962, 51.715),
    Run("8B", True, False, 23.169, 24.043),
    Run("8B", False, False, 44.650, 47.078),
]


def stand_in(folder: Path) -> None:
    """A GPU for PyTorch to believe in, before PyTorch is there: it asks once."""
    library = folder / "stand_in_gpu.so"
    if not library.is_file():
        code = "import sys; from pathlib import Path; from tests.stand_in.gpu import build; build(Path(sys.argv[1]))"
        if os.spawnle(os.P_WAIT, sys.executable, sys.executable, "-c", code, str(folder), _environment()):
            sys.exit("the stand-in of a GPU (tests/stand_in/gpu.cpp) does not compile")
    os.environ["STAND_IN_GPUS"] = "1"
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for each in (libraries / "libtorch_python.so", library):
        ctypes.CDLL(str(each), ctypes.RTLD_GLOBAL)
    import torch
    import torch.amp.autocast_mode as autocast
    import torch.cuda.amp.common as common

    for module in (autocast, common):
        module.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def events(run: Run) -> list:
    import torch
    import transformers.masking_utils as masks
    from allocations import Recorder
    from caching_allocator import EMPTY_CACHE, RESET_PEAKS
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **_: Any):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
        return found[0].transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("sdpa", flash)  # the kernel that SDPA takes on a GPU
    masks.find_packed_sequence_indices = lambda *_, **__: None  # it would look at values
    config = LlamaConfig(**SHAPES[run.model], vocab_size=128256, attn_implementation="sdpa", use_cache=False)
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=run.wide)
    recorder = Recorder("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        model.get_base_model().tie_weights()
        for adapter in (False, True):
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if ("lora_" in name) == adapter:
                    recorder.count(tensor)
        recorder.events += [EMPTY_CACHE, RESET_PEAKS]
        if run.checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device="cuda")
        recorder.count(ids)
        with recorder:
            for _ in range(3):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    out = model(input_ids=ids, labels=ids)
                    loss = out.loss
                recorder.in_backward = True
                loss.backward()
                recorder.in_backward = False
                del out, loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return list(recorder.events)


def row(run: Run) -> str:
    from caching_allocator import replay

    found = events(run)
    fixed, grown = replay(found), replay(found, expandable=True)
    reserved = fixed.peak_reserved / GIB
    return (
        f"| {run.model} | {'on' if run.checkpointed else 'off'} | {'fp32, autocast' if run.wide else 'bf16'} | "
        f"{run.allocated:.3f} | {fixed.peak_allocated / GIB:.3f} | {run.reserved:.3f} | {reserved:.3f} | "
        f"{reserved / run.reserved - 1:+.2%} | {run.reserved / run.allocated - 1:.1%} | "
        f"{fixed.peak_reserved / fixed.peak_allocated - 1:.1%} | {grown.peak_reserved / grown.peak_allocated - 1:.1%} |"
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    place = Path(tempfile.gettempdir()) / "loadmaster-stand-in"
    place.mkdir(exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    stand_in(place)
    print(
        "| model | checkpointing | adapters | allocated, measured | simulated | reserved, measured | simulated | off | "
        "above allocated, measured | simulated | growing segments |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for each in RUNS:
        print(row(each), flush=True)
