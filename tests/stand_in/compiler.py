"""What torch.compile and Triton ask of a GPU, and the kernels that they make for one, run by Triton's interpreter.

With TRITON_INTERPRET=1 in its environment a process of stand-ins compiles as it would for an H100: the same graphs and
the same source of every kernel, whose programs NumPy then runs one by one, on the memory of the tensors themselves.
What is left out is Triton's own compiler, whose work tests/gpu_code.py has assembled.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map

ELEMENTS = 1 << 20
"""Of a block, at most: what Triton allows."""


def install(native, properties: SimpleNamespace, capability: int) -> None:
    """Once torch.cuda and Triton are there."""
    import torch._inductor.config
    import torch._inductor.runtime.triton_helpers as helpers
    from triton.runtime import interpreter

    _answers(properties, capability)
    helpers.libdevice = Libdevice()
    torch._inductor.config.shape_padding = False  # whether that pays, a card's clock would say
    _round()
    _wide_blocks()

    def seen(value):
        return native.on_host(value) if isinstance(value, torch.Tensor) else value

    # The interpreter would copy to the host and back.
    interpreter.GridExecutor._init_args_hst = lambda _, args, options: (tree_map(seen, args), tree_map(seen, options))
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


def _answers(properties: SimpleNamespace, capability: int) -> None:
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.runtime.triton_helpers as helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Interface(interfaces.CudaInterface):
        Event, Stream = torch.cuda.Event, torch.cuda.Stream
        get_device_properties = staticmethod(lambda *_, **__: properties)
        get_compute_capability = staticmethod(lambda *_, **__: capability)
        get_raw_stream = staticmethod(lambda _: 0)
        is_triton_capable = staticmethod(lambda *_: True)
        raise_if_triton_unavailable = staticmethod(lambda *_: None)

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_interface = staticmethod(lambda: torch.cuda)

    def empty_strided(size, stride, dtype):
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    for name in ("cuda", "cuda:0", "cuda:1"):
        interfaces.register_interface_for_device(name, Interface)
    interfaces._device_initialized = True
    driver.set_active(Driver())
    helpers.set_driver_to_gpu = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._dynamo.guards._empty_strided_cuda = empty_strided


class Libdevice:
    """CUDA's mathematical functions, by NumPy's of that name."""

    def __getattr__(self, name: str):
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        function = {"rsqrt": lambda x: 1 / np.sqrt(x)}.get(name) or getattr(np, name)

        def run(*values):
            arrays = [each.handle.data if isinstance(each, tl.tensor) else each for each in values]
            kind = values[0].type
            return tl.tensor(TensorHandle(function(*arrays).astype(arrays[0].dtype), kind.scalar), kind)

        return run


def _round() -> None:
    """Numbers of 16 and 8 bits are PyTorch's: the interpreter cuts them off, multiplies matrices of their bits, and
    has no atomic sums of them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    kinds = {
        tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }

    def numbers(handle):
        if handle.dtype.scalar not in kinds:
            return handle.data
        return torch.from_numpy(np.array(handle.data)).view(kinds[handle.dtype.scalar][0]).float().numpy()

    def cast(_, source, kind, rounding=None):
        kind, found = kind.scalar, numbers(source)
        if kind in kinds:
            dtype, bits = kinds[kind]
            found = torch.from_numpy(np.array(found, dtype=np.float32)).to(dtype).view(bits).numpy()
        return TensorHandle(found.astype(_get_np_dtype(kind)), kind)

    def dot(_, a, b, added, *__):
        found = np.matmul(numbers(a), numbers(b), dtype=added.data.dtype) + added.data
        return TensorHandle(found, added.dtype.scalar)

    def atomic(self, operation, places, added, mask, *order):
        if added.dtype.scalar not in kinds:
            return plainly(self, operation, places, added, mask, *order)
        places_seen, at = np.unique(places.data[mask.data], return_inverse=True)
        pointers = TensorHandle(places_seen, places.dtype)
        every = TensorHandle(np.ones(places_seen.shape, dtype=bool), tl.int1)
        sums = numbers(self.create_masked_load(pointers, every, None, None, None, None))
        np.add.at(sums, at, numbers(added)[mask.data])
        found = self.cast_impl(TensorHandle(sums, tl.float32), added.dtype)
        self.create_masked_store(pointers, found, every, None, None)
        return added

    plainly, InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_rmw, atomic
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = cast
    InterpreterBuilder.create_dot = dot


def _wide_blocks() -> None:
    """A program of a kernel takes the interpreter about as long whatever its block, and a reduction by NumPy less."""
    import numpy as np
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.interpreter import ReduceOps

    begin, by_element = CachingAutotuner.__init__, ReduceOps.apply_impl

    def made(self, *args, **options):
        begin(self, *args, **options)
        sizes = dict(re.findall(r"(\w+)numel = (\d+)", inspect.getsource(self.fn.fn)))
        blocks, room = self.configs[0].kwargs, ELEMENTS
        for axis, hint in sorted((self.size_hints or {}).items()):  # r0_, then x, then y
            # A size that the largest block divides has no mask, so that no block may reach beyond it; one that is
            # not the same in every call has one.
            known = int(sizes.get(axis, 1 << 16))
            divides = known & -known
            block = min(divides if divides >= 1024 else hint, room)
            if f"{axis.upper()}BLOCK" in blocks:
                blocks[f"{axis.upper()}BLOCK"] = block
            room = max(room // block, 1)

    def reduced(self, values):
        known = {helpers.maximum: np.max, helpers.minimum: np.min}  # both keep what is not a number
        if self.combine_fn in known:
            return self.min_max(values[0], known[self.combine_fn])
        return by_element(self, values)

    CachingAutotuner.__init__, ReduceOps.apply_impl = made, reduced
