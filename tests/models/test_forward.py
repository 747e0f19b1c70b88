"""Packed documents must not see each other: losses and gradients equal those of the documents one by one."""

import functools
import operator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from loadmaster.config.schema import LoraConfig
from loadmaster.errors import LoadmasterError
from loadmaster.models import attention
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.attention import PACKED, cached_attention
from loadmaster.models.forward import count_trained, token_losses, trained_logits
from loadmaster.models.load import load_base
from loadmaster.models.rotary import refuse_dynamic
from loadmaster.models.spread import Spread, sizes
from loadmaster.preflight.placement import Room

TEXTS = [
    "The capital of France is Paris, and the Seine runs through it.",
    "Water boils at 100 degrees Celsius at sea level.",
    "def add(a, b):\n    return a + b",
]


def packed(documents: list[list[int]], padding: int = 0):
    ids = functools.reduce(operator.iadd, documents, []) + [0] * padding
    labels = functools.reduce(operator.iadd, documents, []) + [-100] * padding
    positions = functools.reduce(operator.iadd, (list(range(len(d))) for d in [*documents, [0] * padding]), [])
    return SimpleNamespace(
        **{k: torch.tensor([v]) for k, v in {"input_ids": ids, "labels": labels, "position_ids": positions}.items()}
    )


def losses_and_gradients(model, batches):
    model.zero_grad()
    total, count = 0.0, 0
    for batch in batches:
        loss, n = token_losses(model, batch)
        loss.backward()
        total, count = total + loss.item(), count + n
    return total, count, {name: p.grad.clone() for name, p in trainable(model)}


def test_packed_equals_unpacked_on_the_real_model(smollm2, tokenizer):
    """In float64: of float32's rounding, which differs by machine, a small element among large ones shows 1e-5."""
    documents = [tokenizer(text).input_ids for text in TEXTS]
    torch.manual_seed(0)
    model = make_trainable(load_base(smollm2, torch.float32, "cpu"), "lora", LoraConfig(rank=4)).double()
    for name, parameter in trainable(model):  # B starts at zero, which would hide A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    together, count, gradients = losses_and_gradients(model, [packed(documents, padding=5)])
    apart, count_apart, gradients_apart = losses_and_gradients(model, [packed([d]) for d in documents])
    assert count == count_apart == sum(len(d) - 1 for d in documents)
    assert together == pytest.approx(apart, rel=1e-6)  # summed in float32
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_apart[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=120,
        ),
        MistralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=120,
            sliding_window=6,
        ),
        Qwen3Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=120,
        ),
        ArceeConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=120,
        ),
        Ministral3Config(  # queries grow with their position in a document from 4 on
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=120,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.5,
            },
        ),
    ],
    ids=["llama", "mistral-sliding-window", "qwen3", "arcee", "ministral3"],
)
def test_families_agree_with_transformers_own_attention(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    documents = [torch.randint(1, 120, (n,)).tolist() for n in (17, 9, 23)]
    logits, targets = trained_logits(model, packed(documents))
    with cached_attention(model), torch.no_grad():
        expected = torch.cat([model(torch.tensor([d]), use_cache=False).logits[0, :-1] for d in documents])
    assert targets.tolist() == functools.reduce(operator.iadd, (d[1:] for d in documents), [])
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_long_document_does_not_turn_short_ones_beside_it_by_longropes_long_factors(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    config = Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, max_position_embeddings=48, original_max_position_embeddings=12, rope_parameters=rope,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    own = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    own.load_state_dict(model.state_dict())
    documents = [torch.randint(1, 120, (n,)).tolist() for n in (9, 23, 12, 13)]
    logits, _ = trained_logits(model, packed(documents))
    with torch.no_grad():
        expected = torch.cat([own(torch.tensor([d]), use_cache=False).logits[0, :-1] for d in documents])
        torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)
        with cached_attention(model, "eager"):  # what generates has one kind for a batch, as transformers has
            rows = torch.tensor([documents[1][:9], documents[0]])
            torch.testing.assert_close(model(rows).logits, own(rows).logits)
    own.save_pretrained(tmp_path / "model")
    (layer, _), rest = sizes(model)
    room = Spread(Room((rest + 1.5 * layer,)), "cpu", tmp_path / "offload")  # the second layer is left on disk
    spread = load_base(tmp_path / "model", torch.float32, room)
    torch.testing.assert_close(trained_logits(spread, packed(documents))[0], logits)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_by_length_of_some_layers_alone_is_refused_for_longer_documents(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=20, max_position_embeddings=12 if kind == "dynamic" else 48,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED).get_decoder()
    refuse_dynamic(decoder, 12)
    with pytest.raises(LoadmasterError, match=rf"rope_type={kind}(?s:.*)sequence_length=12"):
        refuse_dynamic(decoder, 13)


def test_the_first_token_of_a_document_gets_no_loss():
    batch = packed([[1, 2, 3], [4, 5]])
    assert count_trained(batch.labels, batch.position_ids) == 3


@pytest.mark.parametrize(("dtype", "way"), [(torch.bfloat16, "by_bounds"), (torch.float32, "_by_document")])
def test_on_a_gpu_float32_is_attended_without_the_kernel_that_takes_16_bits(dtype, way, monkeypatch):
    with FakeTensorMode():
        q = torch.empty(1, 4, 6, 8, dtype=dtype, device="cuda")
    called = []
    for name in ("by_bounds", "_by_document"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: called.append(name) or torch.empty(1, 4, 6, 8))
    bounds, longest = torch.tensor([0, 2, 6], dtype=torch.int32), torch.empty(4, 0)
    attention.packed_attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=bounds, longest_document=longest)
    assert called == [way]


def test_attention_without_document_bounds_is_refused(smollm2):
    model = load_base(smollm2, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="document bounds"):
        model(torch.tensor([[1, 2, 3]]))


def test_nothing_reads_the_embeddings_weight_but_the_embedding() -> None:
    """Under zero3 DeepSpeed gathers a weight for the module that reads it, and keeps it whole beside the head's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16, "head_dim": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    model, reads = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED), []

    class Reads(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    embedding = model.get_input_embeddings()
    embedding._parameters = Reads(embedding._parameters)
    token_losses(model, packed([[1, 2, 3]]))
    assert reads == ["weight"]
