"""Decoder layers compiled one by one: every layer of a kind runs the same compiled code.

Compiling a layer and not the model takes the time of one layer, whatever their number, and leaves what is between
layers alone: FSDP2's hooks, and checkpoints that recompute a whole layer. Shapes are fixed (micro-batches of compiled
layers are whole, their rows padded to sequence_length); what does vary, the documents in a row, is one operation's
concern (attention.py). So nothing is compiled after the rehearsal; the loop counts, and says so if anything is.

What the compiler makes is kept in the run directory, where another start of the run finds it on whatever machine has
that folder, and once more on this machine for other runs. Its keys hold code, shapes, versions and card.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType

import torch
from torch import nn

from loadmaster.files import cache_root, own_folder
from loadmaster.models.forward import causal_lm, decoder_layers
from loadmaster.models.loss import compile_loss

VARIANTS = 64
"""Of one layer's code: kinds of layers, with and without gradients, adapter on and off."""
BACKEND = "inductor"
SHARED_BYTES = 4 * 2**30
"""What runs keep on one machine for one another. Files that were made first make room."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON_VARIABLE = "TRITON_CACHE_DIR"
"""Set by the compiler, where it is not yet, to a folder in the other one."""
_opened: set[str] = set()
"""Folders that this process has set the variable to."""


def set_compiler() -> None:
    """How layers are compiled in this process from now on."""
    from torch._inductor.lowering import add_needs_realized_inputs  # the compiler takes two seconds to import

    from loadmaster.models.merged import MergeNarrowProducts

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    # torch 2.11's shortcut past a module's guards: on there, off since for its crashes (pytorch #181873).
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False
    torch._dynamo.config.optimize_ddp = False  # it would split a layer's graph at the bounds of DDP's buckets
    # Norms' outputs and the product of gate and up are made again for the products that read them in the backward
    # pass: a third of what a layer would keep, for about 1% of a step's time (modelled).
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._inductor.config.post_grad_custom_pre_pass = MergeNarrowProducts()
    # What several products read, as q, k and v, is written once; it was once for each of them: cast to FP8, and under
    # dropout what the base reads, which adapters do not. The compiler knows of its own products only.
    ours, theirs = torch.ops.loadmaster, torch.ops.bitsandbytes
    add_needs_realized_inputs([torch.ops.aten._scaled_mm, ours.add_product, ours.add_nf4_product])
    if hasattr(theirs, "gemm_4bit"):  # the package is imported by layers in nf4
        add_needs_realized_inputs(theirs.gemm_4bit)
    # Sums over tokens that share a kernel with others over features are left unwritten where they are to be part of a
    # larger tensor, from 16k tokens on: wrong gradients without a word (pytorch #193061, torch 2.10 to 2.13).
    torch._inductor.config.triton.mix_order_reduction = False
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # warns of selective checkpoints
    # Advice for who compiles: what is multiplied in fp32 (norms of DoRA, whole models) is meant to be.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)


def compile_layers(model: nn.Module) -> None:
    """Let every decoder layer run compiled, and the loss: when each is first called, forward and backward."""
    set_compiler()
    lm = causal_lm(model)
    lm.disable_input_require_grads()
    if not lm.get_input_embeddings().weight.requires_grad:
        lm.get_input_embeddings().register_forward_hook(_needs_gradient)
    compiled = {}
    for layer in decoder_layers(model):
        forward = layer.forward.__func__
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, dynamic=False, backend=BACKEND)
        layer.forward = MethodType(compiled[forward], layer)
    compile_loss(lm.get_output_embeddings(), BACKEND)


def _needs_gradient(_: nn.Module, __: tuple, embedded: torch.Tensor) -> None:
    """The first layer's input is like the others', or that layer would be compiled by itself.

    transformers' own hook asks for gradients where there are none too (an evaluation), and so parts them there.
    """
    if torch.is_grad_enabled():
        embedded.requires_grad_(True)


def missing_for_a_gpu(on_host: bool) -> str | None:
    """What this machine lacks to compile for a GPU: Triton builds its link to the driver in C, against Python.

    on_host: what runs there is compiled too, in C++.
    """
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc)"
    if on_host and not shutil.which(os.environ.get("CXX", "g++")):
        return "a C++ compiler (g++)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian's python3-dev puts it
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if header.is_file() or {"CPATH", "C_INCLUDE_PATH"} & os.environ.keys():
        return None
    return f"Python's headers ({header})"


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def cache_counts() -> dict[str, int]:
    """Graphs of this process that were found in the compiler's cache, and that were not."""
    counted = torch._dynamo.utils.counters["inductor"]
    return {"found": counted["fxgraph_cache_hit"], "made": counted["fxgraph_cache_miss"]}


def wake_compilers() -> None:
    """Start the processes that assemble a GPU's kernels side by side, which takes them seconds: while the model loads.
    Until they are there kernels are assembled one after the other, by the process that is to train."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.wakeup()


class CompileCache:
    """The compiler's files of one run, in `folder`, taken from and given to this machine's other runs.

    A folder that the user's environment names is used as it is instead.
    """

    def __init__(self, folder: Path, lead: bool = True):
        self.given, self.folder, self.lead = folder, folder.resolve(), lead
        self.shared = cache_root() / "compiled"
        self.rooms = ExitStack()
        self.before: dict[str, str | None] = {}
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Who imports torch._dynamo finds the variable set: to the default, which is nobody's choice.
        ours = {str(self.folder), os.path.abspath(default_cache_dir()), *_opened}
        self.own = os.environ.get(CACHE_VARIABLE, str(self.folder)) in ours
        # Where many write at once on a network volume, Triton fails now and then (triton #11512, pytorch #173679).
        self.triton = os.path.join(default_cache_dir(), "triton", os.environ.get("LOCAL_RANK", "0"))

    @property
    def complete(self) -> Path:
        return self.folder / ".complete"

    @property
    def is_filled(self) -> bool:
        """Whether there are graphs in it, most likely those that this run needs."""
        return next(Path(os.environ.get(CACHE_VARIABLE, self.folder)).glob("fxgraph/*/*"), None) is not None

    def open(self) -> None:
        """Before anything is compiled."""
        # Headers that a CPU's compiler reads in advance lie in one folder for all runs, 150 MB each: half of one, of a
        # compiler that was killed or is still at work for a run that was, fails every run that finds it.
        torch._inductor.config.cpp_cache_precompile_headers = False
        if not torch.cuda.is_available():  # graphs name a CPU's vector instructions, and PyTorch's key of them does not
            torch.compiler.config.cache_key_tag = _instructions()
        if not self.own:
            return
        if not _is_own(self.given, unknown=True):  # its files would be run: as this user, whoever wrote them
            if self.lead:
                print(
                    f"{self.given} is a link, another user's, or anyone's to write to, so nothing in it is run: "
                    "compiling anew", file=sys.stderr, flush=True,
                )
            self.folder = self._room()
        if not _is_own(Path(self.triton).parents[1], unknown=True):  # below /tmp, where anyone may have made it
            self.triton = str(self._room())
        self.before = {name: os.environ.get(name) for name in (CACHE_VARIABLE, TRITON_VARIABLE)}
        os.environ[CACHE_VARIABLE] = str(self.folder)
        os.environ.setdefault(TRITON_VARIABLE, self.triton)
        _opened.add(str(self.folder))
        if not self.lead:
            return
        if not self.complete.exists():
            for library in self.folder.rglob("*.so"):  # killed as it compiled, half of one would be loaded as it is
                library.unlink(missing_ok=True)
            if _is_own(self.shared, unknown=False):
                _add(self.shared, self.folder)
        self.complete.unlink(missing_ok=True)

    def share(self) -> None:
        """Once everything is compiled: what other runs may find here."""
        if self.own and self.lead and self.folder.is_dir() and _is_own(self.shared, unknown=False):
            _add(self.folder, self.shared)
            _shrink(self.shared, SHARED_BYTES)
            with suppress(OSError):  # a full disk
                self.complete.touch()

    def close(self) -> None:
        """After training: what this process compiles later, or starts (a server, another run), is not this run's."""
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self.rooms.close()

    def _room(self) -> Path:
        """A folder of this process alone, until the end."""
        return Path(self.rooms.enter_context(TemporaryDirectory(prefix="loadmaster-", ignore_cleanup_errors=True)))


def _instructions() -> str:
    """Stands for what this machine's CPU can do."""
    lines = []
    with suppress(OSError):  # macOS has no such file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _is_own(folder: Path, unknown: bool) -> bool:
    """unknown: what to say where a disk is full, or not to be written: of that the compiler tells, if it matters."""
    try:
        return own_folder(folder)
    except OSError:
        return unknown


def _add(source: Path, target: Path) -> None:
    """Copy what `target` does not have; each file appears whole.

    Not what Triton keeps: its files name one another by their paths, and each graph has its kernels in itself.
    """
    with suppress(OSError):  # a cache: a full disk, or another run that tidies up, is no reason to stop
        for path in source.rglob("*"):
            name = path.relative_to(source)
            copy = target / name
            left_out = name.parts[0] == "triton" or path.name.endswith((".lock", ".tmp", ".complete"))
            if left_out or not path.is_file() or copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
            try:
                shutil.copy2(path, partial)
                partial.replace(copy)
            finally:
                partial.unlink(missing_ok=True)


def _shrink(folder: Path, most_bytes: int) -> None:
    """Remove the oldest files until the others have `most_bytes` or less."""
    with suppress(OSError):  # another run tidies up
        files = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"}
        left = sum(stat.st_size for stat in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if left <= most_bytes:
                return
            path.unlink(missing_ok=True)
            left -= files[path].st_size
