"""What Python asks of GPUs, answered by those of gpu.cpp: torch.cuda, NVML, NCCL, and kernels that no processor has.

`install(count)` makes this process one that sees so many H100s. Kernels that only GPUs have are those that training
calls, written out in fp32, and hold their callers to what the real ones demand of types, shapes and strides.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map

SOURCE = Path(__file__).with_name("gpu.cpp")
MEMORY = 80 << 30
CARD = "NVIDIA H100 80GB HBM3", 79.65, 9.0
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def build(folder: Path) -> Path:
    """The compiled stand-in in `folder`; a minute, unless it is there."""
    from torch.utils.cpp_extension import load

    load("stand_in_gpu", [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O1"], with_cuda=False)
    return folder / "stand_in_gpu.so"


class Stream:
    def __init__(self, *_, **__):
        self.device, self.cuda_stream, self.stream_id = torch.device("cuda", 0), 0, 0

    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def is_capturing(self) -> bool:
        return False

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...


class Event:
    def __init__(self, enable_timing: bool = False, **_):
        self.timing, self.moment = enable_timing, 0.0

    def record(self, stream=None) -> None:
        self.moment = time.perf_counter()

    def wait(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert self.timing and end.timing
        return 1000 * (end.moment - self.moment)


@contextmanager
def stream(_):
    yield


def install(count: int, library: Path) -> None:
    """Before anything of loadmaster is imported."""
    compiles = os.environ.get("TRITON_INTERPRET") == "1"
    if compiles and importlib.util.find_spec("triton") is None:
        sys.path.append(str(Path(sys.prefix) / "triton"))  # where `make setup` puts it
    native = _load(library)
    import bitsandbytes  # noqa: F401 - while there is no GPU yet: its kernels are those of a processor

    cuda, at, default = torch.cuda, [0], Stream()
    properties = SimpleNamespace(
        name=CARD[0], multi_processor_count=132, major=9, minor=0, total_memory=MEMORY, warp_size=32,
        shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, L2_cache_size=50 << 20, gcnArchName="",
    )

    def apart(answer):
        return lambda *args: answer(*args)  # torch.compile knows functions by what they are

    def set_device(device) -> None:
        at[0] = (device.index if isinstance(device, torch.device) else int(device)) or 0
        native.set_device(at[0])

    answers = {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: count, "current_device": lambda: at[0], "set_device": set_device,
        "_exchange_device": lambda _: at[0], "_maybe_exchange_device": lambda _: at[0],
        "get_device_properties": lambda _=None: properties, "get_device_capability": lambda _=None: (9, 0),
        "get_device_name": lambda _=None: CARD[0], "mem_get_info": lambda _=None: (MEMORY - native.live(), MEMORY),
        "memory_allocated": lambda _=None: native.live(), "memory_reserved": lambda _=None: native.live(),
        "max_memory_allocated": lambda _=None: native.peak(), "max_memory_reserved": lambda _=None: native.peak(),
        "reset_peak_memory_stats": lambda _=None: native.reset_peak(), "empty_cache": lambda: None,
        "synchronize": lambda _=None: None, "Stream": Stream, "Event": Event, "stream": stream,
        "current_stream": lambda _=None: default, "default_stream": lambda _=None: default,
        "get_rng_state": lambda _=None: torch.get_rng_state(), "set_rng_state": lambda state, _=None: None,
        "manual_seed": lambda _: None, "manual_seed_all": lambda _: None,
        "is_bf16_supported": lambda *_, **__: True, "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
        if hasattr(torch.accelerator, name) and ("memory" in name or name == "empty_cache"):
            setattr(torch.accelerator, name, apart(answer))
    torch.accelerator.get_memory_info = apart(cuda.mem_get_info)
    torch.accelerator.current_stream = apart(cuda.current_stream)
    cuda.default_generators = (torch.random.default_generator,)
    cuda.nccl.version = lambda: (2, 29, 0)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, **__: 0)
    torch.version.cuda = "13.0"
    torch._C._cuda_getDeviceCount, torch._C._host_emptyCache = lambda: count, lambda: None
    torch.Tensor.record_stream = lambda self, _: None
    _storages(native)
    _collectives(native)
    _kernels(native)
    if compiles:
        from tests.stand_in import compiler

        compiler.install(native, properties, capability=90)
    import loadmaster.preflight.hardware

    loadmaster.preflight.hardware.local_gpus = lambda: [CARD] * count


def _load(library: Path):
    found = importlib.util.spec_from_file_location("stand_in_gpu", library)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _storages(native) -> None:
    resize = torch.UntypedStorage.resize_

    def resized(self, size: int):
        if self.device.type != "cuda":
            return resize(self, size)
        whole = torch.empty(0, dtype=torch.uint8, device="cuda")
        native.resize_storage(whole.set_(self, 0, (0,), (1,)), size)
        return self

    torch.UntypedStorage.resize_ = resized


def _collectives(native) -> None:
    import torch.distributed as dist

    def make(store, rank: int, size: int, timeout):
        return native.collectives(dist.ProcessGroupGloo(dist.PrefixStore("stand_in", store), rank, size, timeout))

    dist.Backend.register_backend("stand_in", make, devices=["cuda"])
    begin = dist.init_process_group

    def init_process_group(backend: str, device_id=None, **options):
        return begin(backend.replace("nccl", "stand_in"), **options)

    dist.init_process_group = init_process_group


def _kernels(native) -> None:
    host, library = native.on_host, torch.library.Library("aten", "IMPL")

    def documents(bounds_q, bounds_k):
        q, k = host(bounds_q).tolist(), host(bounds_k).tolist()
        return [span for span in zip(q, q[1:], k, k[1:], strict=False) if span[1] > span[0]]

    def scores(q, k, scale, causal, left, right):
        """Of one document [H, n, m], masked; with the keys repeated for each query head."""
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        found = q @ k.transpose(1, 2) * scale
        row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        column, right = torch.arange(k.shape[1])[None], 0 if causal and (right is None or right < 0) else right
        hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        if right is not None and right >= 0:
            hidden |= column > row + right
        if left is not None and left >= 0:
            hidden |= column < row - left
        return found.masked_fill(hidden, -torch.inf), k

    def flash_forward(
        q, k, v, bounds_q, bounds_k, most_q, most_k, dropout, causal, debug, *, scale=None, window_size_left=None,
        window_size_right=None, **_,
    ):
        assert all(each.is_cuda and each.stride(-1) == 1 for each in (q, k, v)) and q.dtype == torch.bfloat16
        assert bounds_q.is_cuda and bounds_q.dtype == torch.int32 and isinstance(most_q, int)
        assert int(host(bounds_q).diff().max()) <= most_q and int(host(bounds_q)[-1]) == q.shape[0] and dropout == 0
        out, normaliser = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[1], q.shape[0])
        scale = scale or q.shape[-1] ** -0.5
        for a, b, c, d in documents(bounds_q, bounds_k):
            x, y, z = (host(t)[s:e].float().transpose(0, 1) for t, s, e in ((q, a, b), (k, c, d), (v, c, d)))
            found, _ = scores(x, y, scale, causal, window_size_left, window_size_right)
            values = found.softmax(-1) @ z.repeat_interleave(x.shape[0] // z.shape[0], 0)
            out[a:b], normaliser[:, a:b] = values.transpose(0, 1).to(q.dtype), found.logsumexp(-1)
        seed = torch.zeros(2, dtype=torch.int64).cuda()
        return out.cuda(), normaliser.cuda(), seed, torch.zeros((), dtype=torch.int64).cuda(), torch.empty(0).cuda()

    def flash_backward(
        gradient, q, k, v, out, normaliser, bounds_q, bounds_k, most_q, most_k, dropout, causal, seed, unused, *,
        scale=None, window_size_left=None, window_size_right=None, **_,
    ):
        assert gradient.is_cuda and gradient.stride(-1) == 1
        scale, groups = scale or q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
        of_q, of_k, of_v = (torch.zeros(t.shape) for t in (q, k, v))

        def folded(wide):
            return wide.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)

        for a, b, c, d in documents(bounds_q, bounds_k):
            spans = (q, a, b), (k, c, d), (v, c, d), (gradient, a, b)
            x, y, z, g = (host(t)[s:e].float().transpose(0, 1) for t, s, e in spans)
            found, y = scores(x, y, scale, causal, window_size_left, window_size_right)
            p = found.softmax(-1)
            of_p = g @ z.repeat_interleave(groups, 0).transpose(1, 2)
            of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
            of_q[a:b], of_k[c:d] = (of_scores @ y).transpose(0, 1), folded(of_scores.transpose(1, 2) @ x)
            of_v[c:d] = folded(p.transpose(1, 2) @ g)
        return tuple(each.to(q.dtype).cuda() for each in (of_q, of_k, of_v))

    def scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
        assert all(each.is_cuda for each in (a, b, scale_a, scale_b))
        assert a.dtype in FP8 and b.dtype in FP8 and not (a.dtype == b.dtype == torch.float8_e5m2)
        assert a.stride(1) == 1 and b.stride(0) == 1, "rows of the first and columns of the second lie together"
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        if scale_a.numel() > 1 or scale_b.numel() > 1:
            assert tuple(scale_a.shape) == (a.shape[0], 1) and tuple(scale_b.shape) == (1, b.shape[1])
            assert out_dtype == torch.bfloat16
        found = host(a).float() @ host(b).float() * host(scale_a) * host(scale_b)
        return (found if bias is None else found + host(bias)).to(out_dtype).cuda()

    def histogram(numbers, bins=100, min=0, max=0):
        return torch.histc(host(numbers).float(), bins, min, max).to(numbers.dtype).cuda()  # of integers, too

    def silu_backward(gradient, x):
        """One kernel; without it PyTorch makes it of seven, with five more tensors of its size."""
        return torch.ops.aten.silu_backward(host(gradient), host(x)).cuda()

    def on_processor(name: str):
        """bitsandbytes' kernel for a processor, on the same memory; what is new goes to the card."""
        op = getattr(torch.ops.bitsandbytes, name).default

        def run(*args, **options):
            made = op(*tree_map(seen, args), **tree_map(seen, options))
            return tree_map(lambda each: each.cuda() if isinstance(each, torch.Tensor) else each, made)

        return run

    def seen(value):
        return host(value) if isinstance(value, torch.Tensor) else value

    quantizing = torch.library.Library("bitsandbytes", "FRAGMENT")
    for name in ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"):
        quantizing.impl(name, on_processor(name), "CUDA")
    quantizing.impl("optimizer_update_8bit_blockwise", on_processor("optimizer_update_8bit_blockwise"), "CUDA")
    library.impl("_flash_attention_forward", flash_forward, "CUDA")
    library.impl("_flash_attention_backward", flash_backward, "CUDA")
    library.impl("_scaled_mm", scaled_mm, "CUDA")
    library.impl("histc", histogram, "CUDA")
    library.impl("silu_backward", silu_backward, "CUDA")
    _kernels.libraries = library, quantizing  # their registrations last as long
