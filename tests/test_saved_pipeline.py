"""New tokens' needs from plan to bundle: an embedding trained whole is in every export that is published."""

import pytest
from safetensors.torch import load_file

from loadmaster.files import read_json
from tests.conftest import FEW_WORDS
from tests.test_pipeline import go

FORMATS = "export.formats=[adapter,bf16,fp8]"


@pytest.mark.slow
def test_what_was_trained_whole_is_in_every_export(few_words, tmp_path):
    code, output = go(
        few_words, tmp_path, "recipe=smoke", "method=lora", "lora.modules_to_save=[lm_head,norm]", "lora.dora=true",
        FORMATS, "optimizer.lr=1e-2", "max_steps=6",
    )
    assert code == 0, output
    export = tmp_path / "run" / "export"
    plan = read_json(tmp_path / "run" / "plan.json")
    assert plan["model"]["trainable_parameters"] > FEW_WORDS * 64
    base, merged = (load_file(folder / "model.safetensors") for folder in (few_words, export / "bf16"))
    assert "lm_head.weight" not in merged
    assert (base["model.embed_tokens.weight"] - merged["model.embed_tokens.weight"]).abs().max() > 1e-2
    manifests = {name: read_json(export / name / "manifest.json") for name in ("adapter", "bf16", "fp8")}
    for name, manifest in manifests.items():
        assert manifest["verification"]["passed"], name
    assert manifests["adapter"]["oldest_server"]["vllm"] is None
    assert manifests["bf16"]["merge"]["tied_embeddings"] and manifests["bf16"]["merge"]["replaced_tensors"] >= 2
    assert read_json(tmp_path / "run" / "bundle" / "manifest.json")["format"] != "adapter"
