"""Compiled and checkpointed layers give the losses and gradients of plain ones, and nothing is compiled twice."""

import dataclasses
import os
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir, triton_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

from loadmaster.config.schema import LoraConfig
from loadmaster.data import MicroBatch
from loadmaster.errors import TrainingFailed
from loadmaster.models import compiled, recompute
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.compiled import CompileCache, compile_layers, graphs_compiled
from loadmaster.models.forward import causal_lm, token_losses
from loadmaster.models.load import random_model
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.training.metrics import read_metrics
from tests.training import test_loop

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1,
}
MISTRAL = {**SHAPE, "model_type": "mistral", "sliding_window": 6}
MINISTRAL = {
    **SHAPE, "model_type": "ministral3", "pad_token_id": 0, "head_dim": 16,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
    },
}
QWEN = {**SHAPE, "model_type": "qwen2"}  # its q, k and v have biases


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """What is kept by a selective checkpoint, and all of compiling but the C++ compiler, which takes its time."""
    monkeypatch.setattr(recompute, "WIDE", 64)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def batch(seed: int, length: int = 64) -> MicroBatch:
    """A row whose documents differ in number and length from seed to seed."""
    generator = np.random.default_rng(seed)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(int(generator.integers(1, 8 + 12 * seed)))
    positions = np.concatenate([np.arange(size) for size in sizes])[:length]
    ids = torch.from_numpy(generator.integers(0, 300, (1, length)))
    return MicroBatch(ids, ids, torch.from_numpy(positions)[None])


def model(form: str | None, method: str, checkpointing: str, compiling: bool, shape: dict = SHAPE):
    made = make_trainable(random_model(shape, torch.float32, "cpu", form), method, LoraConfig(rank=4))
    torch.manual_seed(1)
    for name, parameter in trainable(made):
        if "lora_B" in name:  # which starts at zero, and would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
    kind, _, kept = checkpointing.partition(" but ")
    checkpoint_activations(made, kind, int(kept or 0))
    if compiling:
        compile_layers(made)
    return made.train()


def steps(made) -> tuple[list, int]:
    """(loss and gradients of four batches, graphs compiled after the first)."""
    found, after_first = [], 0
    for seed in range(4):
        made.zero_grad()
        loss, _ = token_losses(made, batch(seed))
        loss.backward()
        found.append((loss.item(), [parameter.grad.clone() for _, parameter in trainable(made)]))
        after_first = after_first or graphs_compiled()
    return found, graphs_compiled() - after_first


CASES = [
    (None, "lora", "none", SHAPE), (None, "lora", "selective", SHAPE), (None, "full", "none", SHAPE),
    (None, "full", "selective", SHAPE), (None, "lora", "full", SHAPE), ("nf4", "qlora", "none", SHAPE),
    ("nf4", "qlora", "selective", SHAPE), ("fp8", "lora", "selective", SHAPE), (None, "lora", "selective", MISTRAL),
    ("fp8", "lora", "selective", QWEN), ("nf4", "qlora", "full", QWEN), (None, "full", "offload", SHAPE),
    ("nf4", "qlora", "offload", SHAPE), ("fp8", "lora", "offload", QWEN), (None, "full", "full but 1", SHAPE),
    ("nf4", "qlora", "full but 2", SHAPE), ("fp8", "lora", "full but 1", QWEN), (None, "lora", "full", MINISTRAL),
]


FROM_OTHERS = {2: 14, 5: 15, 7: 9, 10: 15}
"""Cases whose compiled layers are in another one, too: "X but N" has both kinds of layers, QWEN is SHAPE and biases."""
PLAIN: dict[str, list] = {}
"""Losses and gradients of plain layers, which several cases are compared with."""


@pytest.mark.parametrize(
    ("form", "method", "checkpointing", "shape", "compiling"),
    [
        pytest.param(
            *case, compiling, id=f"{case[1]}-{case[2]}-{number}-{'compiled' if compiling else 'eager'}",
            marks=[pytest.mark.slow] * (compiling and number in FROM_OTHERS),
        )
        for number, case in enumerate(CASES)
        for compiling in (False, True)
        if compiling or case[2] != "none"  # which are the plain layers themselves
    ],
)
def test_losses_and_gradients_are_those_of_plain_layers(form, method, checkpointing, shape, compiling):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    key = f"{form} {method} {shape}"
    if key not in PLAIN:
        PLAIN[key], _ = steps(model(form, method, "none", False, shape))
        assert graphs_compiled() == 0
    found, recompiled = steps(model(form, method, checkpointing, compiling, shape))
    assert recompiled == 0 and graphs_compiled() == 2 * compiling  # of all layers, and of the loss, for all batches
    assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, gradients), (expected, others) in zip(found, PLAIN[key], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_under_attention_dropout_too_nothing_is_compiled_anew_for_other_documents(checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, recompiled = steps(model(None, "lora", checkpointing, True, {**SHAPE, "attention_dropout": 0.1}))
    assert recompiled == 0


def test_products_in_fp32_are_no_news(monkeypatch):
    from torch._inductor import compile_fx

    compile_layers(random_model(SHAPE, torch.float32, "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with warnings.catch_warnings(record=True) as said:
        compile_fx._warn_tf32_disabled.__wrapped__()
    assert not said


def test_a_selective_checkpoint_makes_no_wide_product_and_no_attention_again(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = dict.fromkeys(("mm", "flash", "silu"), 0)

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            for name in self.seen:
                self.seen[name] += name in operation.name().replace("flash_attention_for_cpu_backward", "")
            return operation(*args, **(kwargs or {}))

    seen = {}
    for mode in ("none", "selective", "full"):
        made = model(None, "full", mode, False)
        loss, _ = token_losses(made, batch(1))
        with Count() as count:
            loss.backward()
        seen[mode] = count.seen
    assert seen["selective"]["mm"] == seen["none"]["mm"] < seen["full"]["mm"]
    assert seen["selective"]["flash"] == 0 < seen["full"]["flash"]
    assert seen["none"]["silu"] < seen["selective"]["silu"] == seen["full"]["silu"]


@pytest.mark.parametrize(("form", "method"), [(None, "full"), (None, "lora"), ("nf4", "qlora"), ("fp8", "lora")])
def test_inputs_in_host_memory_and_mlps_by_pieces_change_nothing(form, method, monkeypatch):
    monkeypatch.setattr(recompute, "MLP_TOKENS", 20)  # of 64
    monkeypatch.setattr(recompute, "PIECE_BYTES", 2**8)
    plain, _ = steps(model(form, method, "none", False))
    made = model(form, method, "offload", False)
    host = causal_lm(made).get_decoder().layers[0]._gradient_checkpointing_func.__self__
    loss, _ = token_losses(made, batch(0))
    assert sum(held() is not None for held in host.held) == SHAPE["num_hidden_layers"]
    loss.backward()
    del loss
    assert not any(held() for held in host.held)
    found, _ = steps(made)
    for (loss, gradients), (expected, others) in zip(found, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-4)


def test_a_model_that_is_yet_to_be_sharded_pins_inputs_too_and_copies_them_on_a_stream_of_their_own(monkeypatch):
    """fsdp and zero3 begin with an empty model on the meta device; its inputs come from a GPU."""
    made = random_model(SHAPE, torch.float32, "meta", None)
    checkpoint_activations(made, "offload")
    host = causal_lm(made).get_decoder().layers[0]._gradient_checkpointing_func.__self__
    pieces = MagicMock(wraps=recompute.host_pieces)
    monkeypatch.setattr(recompute, "host_pieces", pieces)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", MagicMock())
    with FakeTensorMode():
        for _ in range(2):
            host.pack(torch.empty(3, 5, device="cuda"))
    torch.cuda.Stream.assert_called_once_with(torch.device("cuda", 0))
    assert torch.cuda.stream.call_count == 2
    assert all(call.kwargs["pinned"] for call in pieces.call_args_list)


@pytest.mark.parametrize("tokens", [1, 78_475, 342_733, 2**18])
def test_host_memory_for_an_input_is_cut_by_powers_of_two(tokens):
    input_ = torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        sizes = [piece.nbytes for piece in recompute.host_pieces(input_, pinned=False)]
    assert sum(sizes) == input_.nbytes
    taken = sum(1 << (size - 1).bit_length() for size in sizes)  # as PyTorch's allocator of pinned memory rounds
    assert taken - input_.nbytes < recompute.PIECE_BYTES


def test_a_passes_inputs_that_were_never_asked_for_are_let_go():
    made = model(None, "lora", "offload", False)
    host = causal_lm(made).get_decoder().layers[0]._gradient_checkpointing_func.__self__
    for _ in range(3):
        token_losses(made, batch(0))  # a forward pass without a backward one
    with torch.no_grad():
        token_losses(made, batch(0))
    assert len(host.held) and not any(held() for held in host.held)
    loss, _ = token_losses(made, batch(0))
    loss.backward()
    assert not any(held() for held in host.held)


def test_changing_the_checkpointing_undoes_what_was_there():
    made = model(None, "lora", "selective", False)
    layer = made.get_base_model().model.layers[0]
    assert "forward" in layer.__dict__
    checkpoint_activations(made, "full")
    assert "forward" not in layer.__dict__ and layer.gradient_checkpointing
    checkpoint_activations(made, "full", 2)
    layers = made.get_base_model().model.layers
    assert [each.gradient_checkpointing for each in layers] == [True, False, False]  # the last ones are kept
    checkpoint_activations(made, "full")
    assert all(each.gradient_checkpointing for each in layers)
    checkpoint_activations(made, "none")
    assert not layer.gradient_checkpointing


def run(tiny, folder, monkeypatch, **plan):
    monkeypatch.setattr(test_loop, "PLAN", dataclasses.replace(test_loop.PLAN, **plan))

    def held_out(session, stopping):
        from loadmaster.evaluation import held_out

        rows = test_loop.rows(7, seed=1)
        return held_out(
            session.model, rows, 0, 2, session.device, session.loss, session.world, stopping, session.fixed_length
        )

    return test_loop.run(tiny, folder, held_out=held_out)[1]


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one_and_compiles_nothing_after_the_rehearsal(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as importing torch._dynamo leaves it
    torch._dynamo.reset()
    plain = run(tiny, tmp_path / "plain", monkeypatch)
    before = graphs_compiled()
    outcome = run(tiny, tmp_path / "compiled", monkeypatch, compile=True, activation_checkpointing="selective")
    assert graphs_compiled() > before and outcome.recompilations == 0 == plain.recompilations
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain")]
    for row, other in zip(*logged, strict=True):
        assert ("eval_loss" in row) == ("eval_loss" in other)
        for figure in {"loss", "grad_norm", "eval_loss"} & set(row):
            assert row[figure] == pytest.approx(other[figure], rel=1e-5)


@pytest.mark.slow
def test_the_compilers_cache_travels_with_the_run_and_serves_the_next_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as importing torch._dynamo leaves it
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    # Kernels of plain C++, without the half a dozen programs that try what vectors the compiler knows. By config it
    # would be so for good: the process keeps the list, and code of other runs with vectors does not compile then.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    found = []
    for name in ("first", "second"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        outcome = run(tiny, tmp_path / name, monkeypatch, compile=True)
        assert outcome.rehearsal.parts_s.keys() >= {"first_step", "second_step", "evaluation", "checkpoint"}
        assert any((tmp_path / name / "compile_cache").rglob("*.so"))
        counted = torch._dynamo.utils.counters["inductor"]
        found.append((counted["fxgraph_cache_hit"], counted["fxgraph_cache_miss"], outcome.train_loss))
        assert outcome.compiler_cache == {"found": found[-1][0], "made": found[-1][1]}
    (_, compiled_first, loss), (hits, misses, again) = found
    assert compiled_first > 0 and hits > 0 and misses == 0 and again == loss


@pytest.mark.slow
def test_what_was_compiled_for_another_cpu_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as importing torch._dynamo leaves it
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    found = []
    for name, cpu in (("first", "one"), ("second", "one"), ("third", "another")):
        monkeypatch.setattr(compiled, "_instructions", lambda cpu=cpu: cpu)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cache = CompileCache(tmp_path / name)
        cache.open()
        assert torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).sum() == 3
        cache.share()
        cache.close()
        found.append(tuple(compiled.cache_counts().values()))
    assert found == [(0, 1), (1, 0), (0, 1)]


def test_layers_that_cannot_be_compiled_end_the_rehearsal_with_a_way_out(tiny, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise OSError("gcc: not found")

    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(TrainingFailed, match=r"gcc: not found(.|\n)*compile=false"):
        run(tiny, tmp_path / "run", monkeypatch, compile=True)


def test_a_cache_folder_of_the_users_own_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    cache = CompileCache(tmp_path / "run")
    cache.open()
    assert not cache.is_filled
    (tmp_path / "mine/fxgraph/ab/graph").mkdir(parents=True)
    assert cache.is_filled
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


def test_what_others_can_have_planted_is_neither_run_nor_removed(tmp_path, monkeypatch, capsys):
    """The compiler loads what its folders hold: whoever writes there runs code as this user."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    triton = Path(default_cache_dir())
    for folder in (tmp_path / "elsewhere", tmp_path / "cache" / "compiled", triton):
        folder.mkdir(parents=True)
        (folder / "planted.so").write_text("code")
        folder.chmod(0o777)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "compile_cache").symlink_to(tmp_path / "elsewhere")
    cache = CompileCache(tmp_path / "run" / "compile_cache")
    cache.open()
    used = [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    assert [list(folder.iterdir()) for folder in used] == [[], []]
    assert not {tmp_path / "elsewhere", triton} & {each for folder in used for each in (folder, *folder.parents)}
    assert (tmp_path / "elsewhere" / "planted.so").exists() and "nothing in it is run" in capsys.readouterr().err
    cache.share()
    cache.close()
    assert not any(folder.exists() for folder in used)
    assert [path.name for path in (tmp_path / "cache" / "compiled").iterdir()] == ["planted.so"]


def test_what_triton_keeps_is_on_the_machines_own_disk_unless_told_otherwise(tmp_path, monkeypatch):
    """The run's folder may be on a network volume, with ranks of many hosts at work in it."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("LOCAL_RANK", "3")
    for told in (None, str(tmp_path / "mine")):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(told))
        if told is None:
            monkeypatch.delenv("TRITON_CACHE_DIR")
        cache = CompileCache(tmp_path / "run")
        cache.open()
        assert triton_cache_dir(0) == (told or os.path.join(default_cache_dir(), "triton", "3"))
        cache.close()
        assert os.environ.get("TRITON_CACHE_DIR") == told


def test_a_run_leaves_the_environment_as_it_was_for_what_this_process_starts_next(tiny, tmp_path, monkeypatch):
    """Servers and workers of another run would take the folder for the user's choice, and fill it with their own."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as importing torch._dynamo leaves it
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    seen = []

    def on_a_gpu(graph, inputs):
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        os.environ["TRITON_CACHE_DIR"] = f"{seen[-1]}/triton/0"  # as inductor's CachingAutotuner does
        raise OSError("that will do")

    monkeypatch.setattr(compiled, "BACKEND", on_a_gpu)
    torch._dynamo.reset()
    with pytest.raises(TrainingFailed):
        run(tiny, tmp_path / "run", monkeypatch, compile=True)
    assert seen == [str(tmp_path / "run" / "compile_cache")]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir() and "TRITON_CACHE_DIR" not in os.environ


def test_a_machines_cache_is_a_help_and_no_condition(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder can be made here")
    cache = CompileCache(tmp_path / "first")
    cache.open()
    for name in ("fxgraph/ab/graph", "triton/0/AB/kernel.cubin"):
        (cache.folder / name).parent.mkdir(parents=True)
        (cache.folder / name).write_text("made")
    cache.share()
    cache.close()
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    CompileCache(tmp_path / "first").share()
    (tmp_path / "second").mkdir()  # of a run that was stopped before it compiled anything
    CompileCache(tmp_path / "second").open()
    assert (tmp_path / "second/fxgraph/ab/graph").read_text() == "made" and CompileCache(tmp_path / "second").is_filled
    assert not (tmp_path / "second/triton").exists(), "its files name one another by the first run's paths"


def test_libraries_of_a_run_that_was_killed_as_it_compiled_are_made_again(tmp_path, monkeypatch):
    """A linker that was killed leaves half of one, which would be loaded: the next run could never compile."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as importing torch._dynamo leaves it
    folder = tmp_path / "run" / "compile_cache"
    kept, library = folder / "ab" / "kernel.main.cpp", folder / "ab" / "kernel.main.so"
    for killed in (True, False):
        CompileCache(folder).open()
        library.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("int main() {}")
        library.write_text("half of it")
        if not killed:
            CompileCache(folder).share()
        CompileCache(folder, lead=False).open()  # another rank's: one process tidies up
        assert library.exists()
        CompileCache(folder).open()
        assert library.exists() != killed and kept.exists()
    other = tmp_path / "other" / "compile_cache"
    CompileCache(other).open()
    assert (other / "ab" / "kernel.main.so").exists(), "shared, once all of it was there"


def test_the_machines_cache_keeps_the_newest_files_of_a_size(tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setattr(compiled, "SHARED_BYTES", 250)
    cache = CompileCache(tmp_path / "run")
    cache.open()
    for age, name in enumerate(("newest", "old", "oldest")):
        path = tmp_path / "run" / "ab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (10**9 - age, 10**9 - age))
    cache.share()
    cache.close()
    assert {path.name for path in (tmp_path / "cache" / "compiled").rglob("*") if path.is_file()} == {"newest", "old"}
    assert (tmp_path / "run" / "ab" / "oldest").is_file()


def test_what_the_compiler_said_is_shown_rather_than_its_command(tiny, tmp_path, monkeypatch):
    from torch._inductor.exc import CppCompileError

    def broken(graph, inputs):
        raise CppCompileError(["g++", *["-D", "A" * 100] * 20], "fatal error: Python.h: No such file or directory")

    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(TrainingFailed, match=r"\(CppCompileError: fatal error: Python.h: No such file or directory\)"):
        run(tiny, tmp_path / "run", monkeypatch, compile=True)


def test_a_gpus_attention_compiles_once_too_whatever_the_documents():
    """On the meta device the engine takes the paths of a GPU: variable-length attention, FP8 units."""
    from loadmaster.training.trace import _meta_model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = make_trainable(_meta_model(SHAPE), "lora", LoraConfig(rank=4))
    checkpoint_activations(made, "selective")
    compile_layers(made)
    for seed in range(4):
        loss, _ = token_losses(made, batch(seed))
        loss.backward()
        assert graphs_compiled() == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        ("lora", "none"), ("lora", "full but 1"), ("full", "full but 1"),
        pytest.param("lora", "full", marks=pytest.mark.slow),
        pytest.param("full", "none", marks=pytest.mark.slow),
        pytest.param("full", "full", marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_compiles_one_more_graph_for_all_layers(method, checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = model(None, method, checkpointing, True)
    for _ in range(2):
        loss, _ = token_losses(made.train(), batch(0))
        loss.backward()
        with torch.no_grad():
            token_losses(made.eval(), batch(1))
    assert graphs_compiled() == 3
