"""The code that a GPU would run, generated and assembled where there is none.

    python tests/gpu_code.py METHOD PRECISION COMPUTE_CAPABILITY [CONFIG_JSON [SETUP_JSON [count|move]]]   # lora fp8 90

One decoder layer and the loss of a model of Llama 3.1 8B's shape, or CONFIG_JSON's, trained as SETUP_JSON says besides
(`{"dora": true}`), go through torch.compile on the meta device. In the place of inductor's last step its graphs are
taken for those of such a GPU, lowered to Triton, and every kernel is assembled by ptxas, which comes with Triton.
Nothing is run; with `count` nothing is assembled either, and the loss is left out; with `move` there is no code at all,
only what the compiler would make kernels of: what they move is known then, and the rest is not said. Printed is JSON:

    graphs    [[forward or backward or loss, kernels assembled]]
    bytes     [forward, backward] that a token of a layer moves, in kernels that memory bounds (fused ones, and narrow
              products), and what wide products are added to
    backward  bytes of a token in use at once that a layer's backward pass makes
    beyond    the same beyond what it was given, which it lets go as it is read
    mixed     graphs with a kernel that sums over tokens and over features at once
    cards     compute capabilities that kernels are for

The GPU is a stand-in at each place where inductor and Triton ask what it is. A CPU build of PyTorch brings no Triton;
`make setup` puts one beside the environment, where nothing else finds it.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import math
import re
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if importlib.util.find_spec("triton") is None:
    sys.path.append(str(Path(sys.prefix) / "triton"))

import sympy
import torch
import torch._dynamo.device_interface as interfaces
import torch._inductor.config
import torch._inductor.fx_passes.reinplace as reinplace
import torch._inductor.pattern_matcher as pattern_matcher
import torch._inductor.runtime.triton_helpers as helpers
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from loadmaster.data import MicroBatch
from loadmaster.models import compiled
from loadmaster.models.forward import token_losses
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.blocks import NARROW
from loadmaster.preflight.setup import Setup
from loadmaster.training.trace import _meta_model, with_trained_part

TOKENS, LAYERS = 8192, 2
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}
GPU = torch.device("cuda", 0)


def available() -> AbstractContextManager:
    return patch.object(torch.cuda, "is_available", lambda: True)


def stand_in(capability: int) -> None:
    """What is asked of a GPU is answered as one of this compute capability (90: an H100) would be."""
    properties = SimpleNamespace(
        name="stand-in", multi_processor_count=132, major=capability // 10, minor=capability % 10,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        total_memory=80 << 30, shared_memory_per_block_optin=232448, shared_memory_per_block=49152,
        L2_cache_size=50 << 20, gcnArchName="",
    )

    class Interface(interfaces.CudaInterface):
        get_device_properties = staticmethod(lambda *_, **__: properties)
        get_compute_capability = staticmethod(lambda *_, **__: capability)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        is_triton_capable = staticmethod(lambda *_: True)
        raise_if_triton_unavailable = staticmethod(lambda *_: None)
        get_raw_stream = staticmethod(lambda _: 0)

    class Driver:
        utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448})

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return GPU

    DeviceProperties.create.cache_clear()  # another card's, where this process is a fork of one that had it
    for name in ("cuda", "cuda:0"):
        interfaces.register_interface_for_device(name, Interface)
    interfaces._device_initialized = True
    driver.set_active(Driver())
    helpers.set_driver_to_gpu = lambda: None
    torch.cuda.get_device_properties = lambda *_, **__: properties
    torch.cuda.get_device_capability = lambda *_, **__: divmod(capability, 10)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    scatter = reinplace._inplace_generalized_scatter

    def unchecked(inputs: torch.Tensor, source: torch.Tensor, views: object) -> torch.Tensor:
        """It copies to see whether shapes agree, which a CPU build does not even pretend for a GPU."""
        try:
            return scatter(inputs, source, views)
        except RuntimeError:
            return inputs

    reinplace._inplace_generalized_scatter = unchecked
    pattern_matcher.fallback_node_due_to_unsupported_type = lambda *_, **__: False  # what is on meta is passed over


class Propagated(FakeTensorProp):
    def run_node(self, node: torch.fx.Node) -> object:
        if node.target is torch.ops.prims.inductor_lookup_seed.default:  # by an index, for which a GPU is asked
            node.meta["val"] = torch.empty((), dtype=torch.int64, device=GPU)
            return node.meta["val"]
        return super().run_node(node)


class Generated:
    """A backend of torch.compile that generates code for the stand-in, keeps it, and runs the graph as it is."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.graphs: list[tuple[str, str, int]] = []
        """(kind, code, bytes that kernels bound by memory move)"""

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> object:
        return compile_fx.compile_fx(module, inputs, inner_compile=self._lower)

    def _lower(self, module: torch.fx.GraphModule, inputs: list, **options: object) -> object:
        layer = {kind for kind, _, _ in self.graphs} >= {"forward", "backward"}
        if self.what == "assemble" or not layer:  # what comes after a layer's two is the loss
            with available():
                self._generate(copy.deepcopy(module), inputs, bool(options.get("is_backward")))
        return compile_fx.make_boxed_func(module.forward)

    def _generate(self, module: torch.fx.GraphModule, inputs: list, backward: bool) -> None:
        for node in module.graph.nodes:
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _on_gpu)
        mode = detect_fake_mode(inputs)
        with mode:
            there = [
                torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=GPU) if torch.is_tensor(x) else x
                for x in inputs
            ]
        with V.set_fake_mode(mode), torch._guards.tracing(torch._guards.TracingContext(mode)):
            Propagated(module, mode).propagate_dont_convert_inputs(*there)
            compile_fx.record_original_output_strides(module)
            compile_fx._recursive_post_grad_passes(module, is_inference=False)
            graph = GraphLowering(module, example_inputs=there, shape_env=mode.shape_env, is_backward=backward)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*there)
                if self.what == "move":
                    graph.init_wrapper_code()
                    graph._update_scheduler()
                    code = ""
                else:
                    code, _ = graph.codegen()
                self.seen(module, graph, getattr(code, "value", code), backward)

    def seen(self, module: torch.fx.GraphModule, graph: GraphLowering, code: str, backward: bool) -> None:
        moved = sum(bytes_of(node) for node in graph.scheduler.nodes)
        self.graphs.append(("backward" if backward else "forward", code, moved))


def _on_gpu(value: object) -> object:
    return GPU if isinstance(value, torch.device) else value


def bytes_of(node: object) -> int:
    """That a kernel reads and writes, if it is a fused one or a narrow product, or that it adds a wide one to."""
    kind = type(node).__name__
    if kind == "NopKernelSchedulerNode":
        return 0
    if kind != "ExternKernelSchedulerNode":
        return sum(accessed(node).values())
    called = node.node.python_kernel_name or ""
    if called.startswith("torch.ops.loadmaster.add_"):  # models/added.py
        total = node.node.inputs[0]
        return math.prod(map(int, total.get_size())) * total.get_dtype().itemsize
    if not called.endswith(".mm"):
        return 0
    sizes = [int(size) for factor in node.node.inputs[:2] for size in factor.get_size() if str(size).isdigit()]
    return node.get_read_write_buffers_sizes() if min(sizes) < NARROW else 0


def accessed(node: object) -> dict[str, int]:
    """Bytes that a fused kernel reads or writes of each buffer. The compiler counts a buffer whole of which a part of
    each row is read, as q is of q, k and v."""
    found = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    parts: dict[str, list[tuple[int, float]]] = {}
    for dep in node.read_writes.reads:
        if isinstance(dep, MemoryDep) and dep.get_numel() >= TOKENS:
            offset = sympy.expand(dep.get_offset(), identity=True)
            start = int(offset) if offset.is_number else 0  # of rows that are looked up, whole ones are read
            parts.setdefault(dep.name, []).append((start, start + int(dep.get_numel()) / TOKENS))
    written = {dep.name for dep in node.read_writes.writes}
    for name in parts.keys() & found.keys() - written:
        covered = end = 0
        for start, stop in sorted(parts[name]):
            covered += max(0, stop - max(start, end))
            end = max(end, stop)
        found[name] = min(found[name], math.ceil(covered * TOKENS) * V.graph.get_dtype(name).itemsize)
    return found


def given(code: str) -> dict[str, int]:
    """Bytes of each argument of generated code that holds tokens."""
    arguments = re.findall(r"(\w+) = rand_strided\((\(.*?\)), .*?, dtype=torch\.(\w+)\)", code)
    shapes = {name: (ast.literal_eval(shape), getattr(torch, dtype)) for name, shape, dtype in arguments}
    return {name: math.prod(s) * dtype.itemsize for name, (s, dtype) in shapes.items() if TOKENS in s}


def made(code: str, beyond: dict[str, int]) -> int:
    """Most bytes at once of what generated code makes itself, beyond what it was given, if that counts; what a reused
    or returned buffer holds goes on."""
    held = dict(beyond)
    most = 0
    for line in map(str.strip, code[code.index(" call(") :].splitlines()):
        if new := re.match(r"(\w+) = empty_strided_cuda\((\(.*?\)), \(.*?\), torch\.(\w+)\)", line):
            dtype = getattr(torch, new[3])
            held[new[1]] = math.prod(ast.literal_eval(new[2])) * dtype.itemsize
        elif again := re.match(r"(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*; del \2\b", line):
            held[again[1]] = held.pop(again[2], 0)
        elif gone := re.match(r"del (.*)", line):
            for name in gone[1].split("#")[0].split(","):
                held.pop(name.strip(), None)
        most = max(most, sum(held.values()))
    return most - sum(beyond.values())


def assembled(code: str, folder: Path) -> int:
    """How many kernels this code has; each is assembled in every form that a first run chooses from."""
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL)
    for name, source in kernels:
        path = folder / f"{name}.py"
        path.write_text(source.replace("\\'", "'").replace("\\\\", "\\"), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        for form in tuner.configs:
            tuner._precompile_config(form)  # raises what Triton or ptxas says
    return len(kernels)


def generate(
    method: str, precision: str, capability: str, config: str = "{}", fields: str = "{}", what: str = "assemble"
) -> dict[str, object]:
    stand_in(int(capability))
    torch._dynamo.reset()  # a process that this one is a fork of may have generated other code
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.joint_graph_constant_folding = False  # a meta tensor's sum would be a constant to it
    compiled.BACKEND = generated = Generated(what)
    setup = Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True, **json.loads(fields)
    )
    model = with_trained_part(_meta_model({**LLAMA, **json.loads(config), "num_hidden_layers": LAYERS}), setup)
    checkpoint_activations(model, setup.checkpointing)
    compiled.compile_layers(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    loss, _ = token_losses(model, MicroBatch(ids, ids, torch.arange(TOKENS)[None]))
    loss.backward()
    graphs = generated.graphs
    with available(), tempfile.TemporaryDirectory() as folder:
        found = [(kind, assembled(code, Path(folder)) if what == "assemble" else 0) for kind, code, _ in graphs]
    moved = [round(next(moved for kind, _, moved in graphs if kind == way) / TOKENS) for way in ("forward", "backward")]
    if what == "move":
        return {"bytes": moved}
    backward = next(code for kind, code, _ in graphs if kind == "backward")
    mixed = sum("MixOrderReductionGrid" in code for _, code, _ in graphs)
    cards = sorted({int(card) for _, code, _ in graphs for card in re.findall(r"\bcc=(\d+)", code)})
    said = {"graphs": found, "bytes": moved, "mixed": mixed, "cards": cards}
    said |= {"backward": round(made(backward, {}) / TOKENS), "beyond": round(made(backward, given(backward)) / TOKENS)}
    return said


if __name__ == "__main__":
    print(json.dumps(generate(*sys.argv[1:])))
