"""Checks of an exported folder and its weights, each by itself, on a few numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from loadmaster.export import checks, live_checks
from loadmaster.files import write_json

FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def layers(quantized: int, plain: int) -> dict[str, torch.Tensor]:
    """Matrices of 64 weights each, beside an embedding in 16 bits that is larger than all of them."""
    found = {f"layers.{at}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn) for at in range(quantized)}
    found |= {f"layers.{quantized + at}.weight": torch.ones(8, 8).bfloat16() for at in range(plain)}
    found |= {f"layers.{at}.weight_scale": torch.ones(8, 1).bfloat16() for at in range(quantized)}
    return {**found, "model.embed_tokens.weight": torch.ones(1024, 8).bfloat16()}


def fp8_export(folder, tensors, config=FP8):
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"quantization_config": config})
    return folder


@pytest.mark.parametrize(
    ("quantized", "plain", "share"), [(20, 0, None), (19, 1, None), (17, 3, "85%"), (10, 10, "50%")]
)
def test_a_tenth_of_the_weights_may_be_left_in_16_bits_and_no_more(tmp_path, quantized, plain, share):
    found = checks.storage(fp8_export(tmp_path, layers(quantized, plain)), "fp8")
    assert len(found) == (share is not None)
    if share:
        assert f"only {share} of the weights are stored as float8_e4m3fn" in found[0]


def test_a_packed_tensor_counts_as_many_weights_as_it_holds(tmp_path):
    """96 rows of 64 weights: 8 in each element in int4, 2 in nvfp4; and a plain matrix of as many, which is half."""
    for name, dtype, held in (("int4", torch.int32, 8), ("nvfp4", torch.uint8, 2)):
        packed = torch.zeros(96, 64 // held, dtype=dtype)
        save_file(
            {"a.weight_packed": packed, "b.weight": torch.zeros(96, 64).bfloat16(), "b.bias": torch.zeros(9)},
            tmp_path / "model.safetensors",
        )
        assert checks.quantized_share(tmp_path, checks.STORAGE[name][1]) == (0.5, ["b.weight"])


@pytest.mark.parametrize("config", [{**FP8, "format": "pack-quantized"}, {"quant_method": "bitsandbytes"}])
def test_a_config_that_says_another_quantization_or_none_is_not_the_formats(tmp_path, config):
    (said,) = checks.storage(fp8_export(tmp_path, layers(4, 0), config), "fp8")
    assert said.endswith("fp8 is 'float-quantized'")


def test_few_bits_in_a_16_bit_export_are_named(tmp_path):
    write_json(tmp_path / "config.json", {})
    kinds = {torch.bfloat16: 0, torch.float32: 0, torch.float8_e4m3fn: 1, torch.int8: 1, torch.int32: 1}
    for dtype, odd in kinds.items():
        save_file({"a.weight": torch.ones(8, 8).to(dtype)}, tmp_path / "model.safetensors")
        found = checks.storage(tmp_path, "bf16")
        assert found == ["a.weight: quantized weights in a bf16 export"] * odd, dtype


def test_nan_among_fp8_weights_is_found(tmp_path):
    tensors = layers(3, 0)
    assert checks.finite(fp8_export(tmp_path, tensors)) == []
    tensors["layers.1.weight"].view(torch.uint8)[3, 3] = 0x7F
    assert checks.finite(fp8_export(tmp_path, tensors)) == ["layers.1.weight: NaN or infinity"]


@pytest.mark.parametrize(
    ("generation", "config", "missing"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 9}, None),
        ({"eos_token_id": [2]}, {"eos_token_id": [0, 2]}, "0"),
        ({"eos_token_id": 2}, {}, "0"),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 2]}, "2"),
        ({}, {"eos_token_id": [0, 2, 7]}, None),
        ({}, {"eos_token_id": 2}, "0"),
        (None, {"eos_token_id": [0, 2]}, None),
        (None, {}, "0, 2"),
    ],
)
def test_every_token_that_ends_a_turn_is_listed_where_a_server_looks(tmp_path, generation, config, missing):
    write_json(tmp_path / "config.json", config)
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    found = checks.stop_tokens(tmp_path, tmp_path / "base", [2, 0])
    assert [f" does not list {missing}, which" in said for said in found] == [True] * (missing is not None)


@pytest.mark.parametrize(
    ("exported", "wrong"),
    [
        ({"r": 4, "use_rslora": True, "base_model_name_or_path": "of/the-hub"}, None),
        ({"r": 4}, "use_rslora"),
        ({"r": 4, "use_rslora": True, "use_dora": True}, "use_dora"),
        ({"r": 4, "use_rslora": False}, "use_rslora"),
    ],
)
def test_a_setting_of_an_adapter_that_is_gone_new_or_other_is_named(tmp_path, exported, wrong):
    trained, folder = tmp_path / "trained", tmp_path / "adapter"
    settings = {trained: {"r": 4, "use_rslora": True, "base_model_name_or_path": "/models/base"}, folder: exported}
    for each, config in settings.items():
        each.mkdir()
        save_file({"q.lora_A.weight": torch.ones(4, 8)}, each / "adapter_model.safetensors")
        write_json(each / "adapter_config.json", config)
    found = checks.as_trained(folder, trained)
    assert found == ([f"adapter_config.json has another {wrong} than in training"] if wrong else [])


def test_zero_rows_of_an_embedding_or_head_are_of_tokens_that_never_came(tmp_path):
    rows = torch.ones(16, 4)
    rows[5] = 0
    names = ("lm_head.lora_B.weight", "embed_tokens.lora_embedding_B", "layers.0.up_proj.lora_B.weight")
    save_file({name: rows.clone() for name in names}, tmp_path / "adapter_model.safetensors")
    assert checks.lora_rows(tmp_path) == [f"{names[-1]} (1 row): rows of zeros: not all of it was saved"]


@pytest.mark.parametrize(
    ("part", "at", "value", "said"),
    [
        ("lora_A", (0, 0), float("nan"), "NaN or infinite"),
        ("lora_B", (3, 1), float("-inf"), "NaN or infinite"),
        ("lora_B", ..., 0.0, "all zero, as at initialisation"),
        ("lora_A", 2, 0.0, "(1 row): rows of zeros"),
        ("lora_B", (slice(None), 1), 0.0, "(1 of 4): ranks unchanged from initialisation"),
        ("lora_A", (slice(None), 1), 0.0, None),  # an input that never came
        ("lora_B", (3, 1), 0.0, None),
    ],
)
def test_an_adapter_that_has_not_learnt_is_told_from_one_with_zeros(tmp_path, part, at, value, said):
    tensors = {"up_proj.lora_A.weight": torch.ones(4, 8), "up_proj.lora_B.weight": torch.ones(16, 4)}
    tensors[f"up_proj.{part}.weight"][at] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = checks.lora_rows(tmp_path)
    assert len(found) == (said is not None)
    if said:
        assert f"up_proj.{part}.weight" in found[0] and said in found[0]


def test_other_tokens_are_other_tokens_where_they_are_as_many(monkeypatch):
    monkeypatch.setattr(checks, "token_ids", lambda tokenizer, conversation: tokenizer.ids[conversation.origin])
    trained, exported = (
        SimpleNamespace(chat_template=None, ids={"a.jsonl:1": [1, 2], "a.jsonl:2": last}) for last in ([3, 4], [3, 5])
    )
    conversations = [SimpleNamespace(origin=origin) for origin in trained.ids]
    assert checks.template(trained, trained, conversations) == []
    assert checks.template(exported, trained, conversations) == ["a.jsonl:2 gives other tokens than in training"]


# ---------------------------------------------------------------- numbers of live weights


def test_a_weight_is_its_own_but_for_half_a_unit_in_the_last_place_of_bf16(monkeypatch):
    exact = torch.linspace(-3, 3, 400).reshape(100, 4)
    assert live_checks._is_rounded(exact.bfloat16(), exact)
    assert not live_checks._is_rounded(exact * (1 + 2**-7), exact)
    assert not live_checks._is_rounded(exact[:50], exact)
    monkeypatch.setattr(live_checks, "COMPARED_AT_A_TIME", 40)
    for row in (0, 55, 99):  # wherever among those that are compared at a time
        other = exact.clone()
        other[row, 1] *= 1.1
        assert not live_checks._is_rounded(other, exact), row


@pytest.mark.parametrize(
    ("small", "found", "same"), [(0.0, 2**-21, True), (0.0, 2**-19, False), (2**-12, 2**-11, False)]
)
def test_what_cancels_to_almost_nothing_may_be_off_by_a_float32_sum_and_no_more(small, found, same):
    assert live_checks._is_rounded(torch.tensor([[1.0, found]]), torch.tensor([[1.0, small]])) is same


def test_of_weights_in_few_bits_one_in_five_hundred_may_be_beyond():
    exact = torch.ones(10, 100)
    for count, accepted in ((0, True), (2, True), (3, False), (12, False)):
        other = exact.clone()
        other.view(-1)[:count] = 1.5
        assert live_checks._is_rounded(other, exact, live_checks.QUANTIZED_OTHERWISE) is accepted
        assert live_checks._is_rounded(other, exact) is (count == 0)


def test_which_formats_are_held_to_the_trained_weights_matrix_by_matrix():
    formats = ("bf16", "adapter", "gguf", "fp8", "fp8_block", "int4", "int4_gptq", "int4_awq", "nvfp4")
    assert [name for name in formats if live_checks.keeps_plain(name)] == [
        "bf16", "fp8", "fp8_block", "int4", "int4_gptq", "nvfp4",
    ]
    assert [name for name in formats if live_checks.keeps_matrices(name)] == [
        "gguf", "fp8", "fp8_block", "int4", "int4_gptq", "nvfp4",
    ]


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """What is said of an export, where two layers were trained over 4-bit weights and a norm as a whole."""
    torch.manual_seed(0)
    names = ("a.weight", "b.weight")
    stored = {name: torch.randn(40, 50).bfloat16() for name in names} | {"norm.weight": torch.ones(8).bfloat16()}
    stored |= {"experts.0.weight": torch.randn(4, 8).bfloat16(), "embed.weight": torch.randn(40, 50).bfloat16()}
    held = {name: stored[name].float() + 0.1 * torch.randn(40, 50) for name in names}
    update = {name: 0.1 * torch.randn(40, 50) for name in names}
    norm = torch.full((8,), 1.25)

    def live(_):
        yield from ((name, held[name], update[name], True) for name in names)
        yield "norm.weight", norm, None, False
        yield "embed.weight", stored["embed.weight"].float(), None, False

    monkeypatch.setattr(live_checks, "live_weights", live)
    base, folder = tmp_path / "base", tmp_path / "bf16"
    for each in (base, folder):
        each.mkdir()
    save_file(stored, base / "model.safetensors")
    trained_over = {name: held[name] + update[name] for name in names}
    over_stored = {name: stored[name].float() + update[name] for name in names}

    def said(tensors) -> list[str]:
        save_file({name: tensor.bfloat16().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return live_checks.merged_weights(SimpleNamespace(peft_config={}), [folder], base)[str(folder)]

    good = {**stored, "norm.weight": norm}
    return SimpleNamespace(
        said=said, good=good, trained_over=trained_over, over_stored=over_stored, held=held, stored=stored
    )


def test_a_merge_is_into_the_weights_trained_over_or_into_the_stored_ones_throughout(merged):
    assert merged.said({**merged.good, **merged.trained_over}) == []
    assert merged.said({**merged.good, **merged.over_stored}) == []
    mixed = {"a.weight": merged.trained_over["a.weight"], "b.weight": merged.over_stored["b.weight"]}
    (said,) = merged.said({**merged.good, **mixed})
    assert said.endswith("is not the weight that was trained, beyond bf16's rounding (1 of 5 tensors)")


@pytest.mark.parametrize("name", ["a.weight", "norm.weight", "experts.0.weight"])
def test_a_tensor_that_is_not_the_trained_one_is_named(merged, name):
    """Of a layer its update is left out, of a norm all training; an expert is the base's."""
    for whole in (merged.trained_over, merged.over_stored):
        broken = {**merged.good, **whole}
        for weight in (merged.held.get(name), merged.stored[name], 2 * broken[name]):
            if weight is None or (name == "experts.0.weight" and weight is merged.stored[name]):
                continue
            (said,) = merged.said({**broken, name: weight})
            assert said.startswith(f"{name} is not the weight that was trained") and "(1 of 5 tensors)" in said


def test_codes_that_another_device_rounds_otherwise_are_allowed_in_weights_in_few_bits_alone(merged):
    for whole, count, accepted in ((merged.trained_over, 4, True), (merged.trained_over, 5, False),
                                   (merged.over_stored, 1, False)):
        other = {name: weight.clone() for name, weight in whole.items()}
        other["a.weight"].view(-1)[:count] += 3.0
        assert (merged.said({**merged.good, **other}) == []) is accepted
    embedding = merged.good["embed.weight"].float()
    embedding[7, 7] += 3.0
    (said,) = merged.said({**merged.good, **merged.trained_over, "embed.weight": embedding})
    assert said.startswith("embed.weight is not the weight that was trained")


def test_an_export_of_which_nothing_can_be_compared_does_not_pass(merged):
    assert merged.said({"other.weight": torch.ones(4, 4)}) == [
        "none of its tensors has the name of a live weight, so nothing could be compared"
    ]
