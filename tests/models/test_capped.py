"""Gemma 2: capped scores, windows and documents as transformers' eager attention has them, by both ways of the engine.

The fused way is what a GPU runs, but for its kernel: FlexAttention's operator, compiled with its parts run as they are.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

from loadmaster.data import MicroBatch
from loadmaster.errors import LoadmasterError
from loadmaster.models import capped
from loadmaster.models.attention import PACKED, cached_attention
from loadmaster.models.forward import trained_logits
from loadmaster.models.load import refuse_unsupported
from tests.models.alone import packed_equals_alone

WINDOW = 6
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 120, "initializer_range": 0.2, "pad_token_id": 0,
}
# Caps that bend: scores reach several times theirs, and the scale is not that of head_dim.
GEMMA_2 = Gemma2Config(
    **SIZES, sliding_window=WINDOW, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
)
LENGTHS = (17, 9, 130, 1, 23)


def use_the_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "BLOCKED", {"cpu"})
    monkeypatch.setattr(capped, "BACKEND", "aot_eager")
    # It refuses gradients on a CPU, for which there is no kernel; its plain operator has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    capped._compiled.cache_clear()


@pytest.fixture(params=["by document", "fused"])
def way(request, monkeypatch):
    if request.param == "fused":
        use_the_fused_way(monkeypatch)
    yield request.param
    capped._compiled.cache_clear()


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 120) for _ in range(length)] for length in LENGTHS]


def packed(documents: list[list[int]]) -> MicroBatch:
    ids = torch.tensor([[token for document in documents for token in document]])
    return MicroBatch(ids, ids, torch.cat([torch.arange(len(d)) for d in documents])[None])


def gemma(implementation: str = PACKED):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GEMMA_2, attn_implementation=implementation)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_are_transformers_eager_ones_document_by_document(method, documents, way):
    packed_equals_alone(gemma(), method, packed(documents), documents, rel=1e-5)


def test_no_document_sees_another(documents, way):
    model, (first, *others) = gemma(), documents
    before, _ = trained_logits(model, packed([first, *others]))
    after, _ = trained_logits(model, packed([first[::-1], *others]))
    inside = len(first) - 1
    assert not torch.allclose(before[:inside], after[:inside], atol=0.1)
    torch.testing.assert_close(before[inside:], after[inside:], rtol=0, atol=1e-5)


def test_generation_keeps_the_cap(documents):
    model, ids = gemma().eval(), torch.tensor([documents[0]])
    with torch.no_grad():
        expected, _ = trained_logits(model, packed(documents[:1]))
        with cached_attention(model):
            cached = model(ids).logits[0, :-1]
            answer = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
        with cached_attention(model, "sdpa"):
            uncapped = model(ids).logits[0, :-1]
        torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
        assert (uncapped - expected).abs().max() > 0.1  # what transformers' default would have served
        greedy = documents[0]
        for _ in range(12):  # past the window, without a cache
            logits, _ = trained_logits(model, packed([[*greedy, 0]]))
            greedy = [*greedy, int(logits[-1].argmax())]
    assert answer == greedy


@pytest.mark.parametrize("window", [None, 3])
def test_the_operators_gradients_are_those_of_its_values(window, monkeypatch):
    monkeypatch.setattr(capped, "BLOCK", 2)  # documents in several pieces
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 4, dtype=torch.double, requires_grad=True) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)

    def output(q, k, v):
        return capped.capped_attention(q, k, v, bounds, 0.7, 1.5, window)[0]

    assert torch.autograd.gradcheck(output, (q, k, v))
    _, logsumexp = capped.capped_attention(q, k, v, bounds, 0.7, 1.5, window)
    assert not logsumexp.requires_grad
    sizes = ("test_schema", "test_faketensor")
    torch.library.opcheck(capped.capped_attention, (q, k, v, bounds, 0.7, 1.5, window), test_utils=sizes)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_those_that_hold_a_visible_pair(seed):
    draw = random.Random(seed)
    length = capped.BLOCK * draw.choice([3, 5])
    ends = sorted(draw.sample(range(1, length), draw.choice([1, 3, 9]))) if seed else [capped.BLOCK]
    bounds = [0, *ends, length]
    made = capped.visible_blocks(bounds, {None, 1, 5, 128, 200}, torch.device("cpu"))
    assert made["documents"].tolist() == [n for n, (a, b) in enumerate(pairwise(bounds)) for _ in range(a, b)]
    for window, tables in made["blocks"].items():
        mask = create_block_mask(capped.sees(made["documents"], window), 1, 1, length, length, device="cpu")
        for kind, name in enumerate(("kv", "full_kv", "q", "full_q")):
            counts, indices = tables[2 * kind : 2 * kind + 2]
            expected, places = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
            assert torch.equal(counts, expected) and indices.shape == places.shape, (name, window)
            for row, count in enumerate(expected[0, 0].tolist()):
                assert indices[0, 0, row, :count].tolist() == places[0, 0, row, :count].tolist()


@pytest.mark.slow
def test_one_compiled_kernel_serves_rows_of_every_length(monkeypatch):
    use_the_fused_way(monkeypatch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for bounds in ([0, 50, 128], [0, 100, 384], [0, 1, 640], [0, 256], [0, 30, 60, 768]):
        q, k, v = (torch.randn(1, bounds[-1], heads, 16).transpose(1, 2) for heads in (4, 2, 2))
        made = capped.visible_blocks(bounds, {None, 64}, q.device)
        for window in (None, 64):
            lens = torch.tensor(bounds, dtype=torch.int32)
            fused = capped.attend_capped(q, k, v, lens, 0.3, 5.0, window, **made)
            exact = capped.attend_capped(q, k, v, lens, 0.3, 5.0, window)
            torch.testing.assert_close(fused, exact, rtol=1e-5, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2]  # a length, and then any
    capped._compiled.cache_clear()


@pytest.mark.slow
@torch.no_grad()
def test_the_generated_kernel_reads_the_blocks_and_gives_the_exact_values(monkeypatch):
    use_the_fused_way(monkeypatch)
    monkeypatch.setattr(capped, "BACKEND", "inductor")  # the compiler's code for a CPU, which has no backward pass
    torch._dynamo.reset()
    torch.manual_seed(0)
    bounds = [0, 100, 300, 384]
    q, k, v = (torch.randn(1, bounds[-1], heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    made, lens = capped.visible_blocks(bounds, {64}, q.device), torch.tensor(bounds, dtype=torch.int32)
    exact = capped.attend_capped(q, k, v, lens, 0.3, 5.0, 64)
    torch.testing.assert_close(capped.attend_capped(q, k, v, lens, 0.3, 5.0, 64, **made), exact, rtol=1e-5, atol=1e-5)
    made["blocks"][64][0][0, 0, 1] = 1  # of the two blocks that the second one sees, the first
    less = capped.attend_capped(q, k, v, lens, 0.3, 5.0, 64, **made)
    torch.testing.assert_close(less[:, :, :128], exact[:, :, :128], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(less[:, :, 128:256], exact[:, :, 128:256], atol=0.1)
    capped._compiled.cache_clear()


def test_kernels_take_small_blocks_where_a_card_has_little_shared_memory():
    a100, rtx4090 = 163 * 1024, 99 * 1024
    assert capped.kernel_options(256, a100) == capped.kernel_options(128, rtx4090) == {}
    small = capped.kernel_options(256, rtx4090)
    assert {small[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2")} == {32} and small["num_stages"] == 2


@pytest.mark.parametrize(("of_a_block", "has_room"), [(232448, True), (101376, False), (0x100000001, False)])
def test_a_driver_that_says_more_shared_memory_than_there_is_gets_small_blocks_too(monkeypatch, of_a_block, has_room):
    whole = 233472 if has_room else 102400
    said = SimpleNamespace(shared_memory_per_block_optin=of_a_block, shared_memory_per_multiprocessor=whole)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    options = capped.kernel_options(256, capped._shared_bytes(torch.device("cuda", 0)))
    assert (options == {}) == has_room


def test_what_attention_cannot_do_is_refused_at_load():
    config = Gemma2Config(**SIZES, attention_dropout=0.1)
    with pytest.raises(LoadmasterError, match=r"attention_dropout=0\.1.*set it to 0"):
        refuse_unsupported(AutoModelForCausalLM.from_config(config, attn_implementation=PACKED))
    sinks = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(LoadmasterError, match="gpt_oss has attention sinks"):
        refuse_unsupported(AutoModelForCausalLM.from_config(sinks, attn_implementation=PACKED))
    refuse_unsupported(gemma())


MEMORY = """
import resource, torch
from transformers import AutoModelForCausalLM
from loadmaster.models.forward import token_losses
from tests.models.test_capped import model_of, packed
model = model_of(num_attention_heads=8, num_key_value_heads=4)
def peak(tokens):
    token_losses(model, packed([list(range(1, 101)) * (tokens // 100)]))[0].backward()
    model.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(100)
print(peak(4000) - before)
"""


def model_of(**changed):
    return AutoModelForCausalLM.from_config(
        Gemma2Config(**{**GEMMA_2.to_dict(), **changed}), attn_implementation=PACKED
    )


@pytest.mark.slow
def test_a_long_document_takes_no_square_of_its_length():
    """One matrix of scores of 4,000 tokens and 8 heads is 488 MiB in fp32; a step by pieces takes less than one."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
