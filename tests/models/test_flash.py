"""FlashAttention in the place of PyTorch's kernel: activated, held against it, refused and taken back.

The kernels here are real ones of PyTorch's operators, for a CPU: one stands for PyTorch's own, others for a package.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import _registry

from loadmaster.models import flash
from loadmaster.models.attention import by_bounds, packed_attention
from loadmaster.training.metrics import read_metrics
from loadmaster.training.session import attention_kernel
from tests.models.kernels import (
    ForgetsGroups,
    ForgetsOneRow,
    ForgetsTheScale,
    Handle,
    IsNan,
    Kernel,
    LaidOutByHead,
    Raises,
    Right,
    SeesOneMore,
    SeesOtherDocuments,
)
from tests.training.test_loop import JOB, run, session_on

CPU = torch.device("cpu")
GROUPED = flash.Call(heads=2, key_value_heads=1, head_dim=64, scale=None, window=None)
WINDOWED = flash.Call(heads=2, key_value_heads=2, head_dim=64, scale=0.1, window=140)
BOTH = [GROUPED, WINDOWED]


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


@pytest.fixture
def own():
    """A kernel that stands for PyTorch's, which has none for a CPU."""
    library = Kernel(block=128).register()
    yield
    library._destroy()


@pytest.fixture
def register(own):
    """Make a kernel known to PyTorch as "test"; nothing of it stays."""

    def known(kernel):
        torch.nn.attention.register_flash_attention_impl("test", register_fn=lambda: Handle(kernel().register()))

    yield known
    if flash._active() is not None:
        flash.restore()
    _registry._FLASH_ATTENTION_IMPLS.pop("test", None)


def numbers(call=GROUPED):
    return flash.results(call, (3, 200), CPU)


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_a_right_kernel_runs_in_the_place_of_pytorchs(register):
    register(Right)
    before = numbers()
    assert flash.refusal("test", BOTH, CPU, longest=4096) is None
    assert flash._active() == "test" and not same(numbers(), before)
    flash.restore()
    assert flash._active() is None and same(numbers(), before)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (ForgetsGroups, r"its dk is not that of PyTorch's kernel: .*% apart \(limit 1%\), one row .*% \(limit 20%\)"),
        (ForgetsOneRow, r"its dq is not that of PyTorch's kernel: 0.* one row 9"),
        (ForgetsTheScale, "its dq is not that of PyTorch's kernel: 2"),
        (SeesOneMore, "its output is not that"),
        (SeesOtherDocuments, "its output is not that"),
        (IsNan, "its dk is not finite"),
        (Raises, "it failed with AssertionError: SM100 backward does not do this$"),
        (LaidOutByHead, "its output is laid out in another way"),
        (lambda: Kernel(block=128), "runs its own kernel in spite of it"),
    ],
)
def test_any_other_is_taken_back(register, kernel, why):
    register(kernel)
    before = numbers(), numbers(WINDOWED)
    said = flash.refusal("test", BOTH, CPU, longest=4096)
    assert re.search(why, said), said
    assert flash._active() is None and same(numbers(), before[0]) and same(numbers(WINDOWED), before[1])


def test_a_package_that_does_not_import_is_taken_back(own):
    def broken():
        raise ImportError("libcudart.so.12: cannot open shared object file")

    torch.nn.attention.register_flash_attention_impl("test", register_fn=broken)
    before = numbers()
    try:
        said = flash.refusal("test", BOTH, CPU, longest=4096)
        unknown = flash.refusal("FA9", BOTH, CPU, longest=4096)
    finally:
        _registry._FLASH_ATTENTION_IMPLS.pop("test")
    assert said == "it failed with ImportError: libcudart.so.12: cannot open shared object file"
    assert unknown.startswith("it failed with ValueError: Unknown flash attention impl 'FA9'")
    assert flash._active() is None and same(numbers(), before)


def test_without_a_kernel_of_pytorchs_nothing_is_activated():
    assert flash.refusal("test", BOTH, CPU, longest=4096).startswith("it failed with NotImplementedError")
    assert flash._active() is None


@pytest.mark.parametrize("call", [GROUPED, WINDOWED, flash.Call(16, 8, 128, None, None)])
def test_the_limits_leave_room_for_rounding_and_none_for_a_wrong_row(call):
    """Exact, and rounded as two kernels round: what is between these is what a right kernel may be apart."""
    found = {}
    for name, block in [("exact", None), ("own", 128), ("other", 64)]:
        library = Kernel(block).register()
        try:
            found[name] = flash.results(call, (1, 5, 130, 600), CPU)
        finally:
            library._destroy()
    for part in found["own"]:
        between = flash.apart(found["other"][part], found["own"][part])
        from_exact = flash.apart(found["own"][part], found["exact"][part])
        assert between[0] < flash.ROW_LIMIT / 4 and between[1] < flash.WHOLE_LIMIT / 2, (part, between)
        assert from_exact[0] < flash.ROW_LIMIT and from_exact[1] < flash.WHOLE_LIMIT, (part, from_exact)


def test_what_is_compared():
    assert flash.documents(None, 4096) == flash.documents(512, 4096) == [*flash.LENGTHS]
    assert flash.documents(2047, 4096)[-1] == (1, 5, 2177)
    assert flash.documents(4096, 4096) == [*flash.LENGTHS]
    state = torch.get_rng_state()
    library = Kernel().register()
    try:
        first, again = numbers(), numbers()
    finally:
        library._destroy()
    assert same(first, again) and torch.equal(torch.get_rng_state(), state)
    assert {name: tuple(t.shape) for name, t in first.items()} == {
        "output": (1, 203, 2, 64), "dq": (1, 203, 2, 64), "dk": (1, 203, 1, 64), "dv": (1, 203, 1, 64),
    }
    assert all(t.dtype == torch.bfloat16 for t in first.values())


def test_the_kernels_of_this_test_are_attention():
    """The stand-in for PyTorch's own against the packed attention that a CPU runs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 64, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    bounds, longest = torch.tensor([0, 7, 40], dtype=torch.int32), torch.empty(33, 0)
    for window in (None, 5):
        library = Kernel().register()
        try:
            found = by_bounds(q, k, v, bounds, longest, 0.2, window)
            wanted, _ = packed_attention(
                None, q, k, v, None, scaling=0.2, sliding_window=window, cu_seq_lens_q=bounds, longest_document=longest
            )
            torch.testing.assert_close(found, wanted)
            upstream = torch.randn(found.shape, generator=generator)
            pairs = zip(*(torch.autograd.grad(o, (q, k, v), upstream) for o in (found, wanted)), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other)
        finally:
            library._destroy()


@pytest.mark.parametrize("layout", ["by token", "by head"])
def test_compiled_code_follows(register, layout):
    """Queries lie by token, as most models' do, or by head, as Phi's. Inductor checks how an operator's results lie."""
    register(Right)
    compiled = torch.compile(by_bounds, fullgraph=True, backend="inductor")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, heads, 64, generator=generator).bfloat16().transpose(1, 2) for heads in (4, 2, 2))
    if layout == "by head":
        q = q.contiguous()
    for t in (q, k, v):
        t.requires_grad_()

    def both():
        output = compiled(q, k, v, torch.tensor([0, 100, 300], dtype=torch.int32), torch.empty(200, 0), None, None)
        return dict(zip("oqkv", (output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))), strict=True))

    before = both()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert flash.refusal("test", [GROUPED], CPU, longest=4096) is None
    during = both()
    flash.restore()
    assert not same(during, before) and same(both(), before)
    assert all(flash.apart(during[name], before[name])[0] < flash.ROW_LIMIT for name in before)
    if layout == "by token":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_is_active_already_is_left_alone(register):
    register(Right)
    torch.nn.attention.activate_flash_attention_impl("test")
    assert flash.activatable() == []
    plain = SimpleNamespace(attention_dropout=0.0, attn_logit_softcapping=None)
    plain.get_text_config = lambda: plain
    assert flash.own_kernel(plain, torch.device("cuda")) == "test"


# ---------------------------------------------------------------- while training runs

PACKAGE = flash.Package("test", "FlashAttention 9", "of_this_test")
METRICS = "metrics.jsonl"


@pytest.fixture
def found_here(monkeypatch):
    """PACKAGE is what there is: this much is said, for the decision needs a GPU. Fewer documents are compared."""
    monkeypatch.setattr(flash, "found_for", lambda *_: PACKAGE)
    monkeypatch.setattr(flash, "LENGTHS", ((1, 5, 130),))


def test_it_is_there_while_training_runs_and_no_longer(tiny, register, found_here):
    register(Right)
    session, said, before, state = session_on(tiny), [], numbers(), torch.get_rng_state()
    for stopped in (False, True):
        try:
            with attention_kernel(session, said.append) as kernel:
                assert kernel == "test" == flash._active() and not same(numbers(), before)
                if stopped:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert flash._active() is None and same(numbers(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == [flash.agreed([(PACKAGE, None)])[1]] * 2

    class Two:
        """Two ranks, of which the other has no such package."""

        def gather(self, mine):
            return [mine, (None, None)]

    session.world, said = SimpleNamespace(device=CPU, gather=Two().gather), []
    with attention_kernel(session, said.append) as kernel:
        assert kernel == "by_document" and flash._active() is None and same(numbers(), before)
    assert len(said) == 1 and "rank 1: it is not there" in said[0]


def test_a_run_is_the_same_with_the_comparison_before_it(tiny, tmp_path, register, request):
    def rows(name):
        _, outcome = run(tiny, tmp_path / name)
        assert flash._active() is None and outcome.steps == JOB.max_steps
        return outcome.attention_kernel, [(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name / METRICS)]

    kernel, without = rows("without")
    assert kernel == "by_document"
    request.getfixturevalue("found_here")
    for kind, name in ((Right, "test"), (Raises, "by_document")):
        register(kind)
        assert rows(kind.__name__) == (name, without)
