"""An ordinary checkpoint from a GGUF that an installed package ships.

transformers reads and dequantizes the weights. What it does not restore is the tokenizer's way of cutting
text before merging (it assumes one for all) and the special tokens, so these are set from the GGUF's own
fields; token ids then equal llama.cpp's (checked on prose and a chat prompt, 2026-11-23, transformers 5.17).
Weights that were 4-bit in the GGUF stay at those values: the bf16 result is its own reference, not the
published model's bf16.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from loadmaster.errors import LoadmasterError
from loadmaster.files import cached_in, exclusive, publish_folder
from loadmaster.models.libraries import deepspeed_told

# ggml's name of the pre-tokenizer -> whether digits are cut one by one before byte-level BPE
PRE_TOKENIZERS = {"smollm": True, "gpt-2": False}


def convert_package(package: str, target: Path) -> Path:
    """Write the package's GGUF as safetensors, config and tokenizer to `target`; return it.

    Returns at once when `target` exists; of processes that want it together one makes it. Raises LoadmasterError when
    the package holds no single GGUF or one with a tokenizer that is not known.
    """
    if (target / "config.json").is_file():
        return target
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise LoadmasterError(f"package {package} ships {len(files)} GGUF files, one is needed; set model.path instead")
    with exclusive(target, f"the model of {package}"):
        if not (target / "config.json").is_file():  # another process may have made it meanwhile
            said = f"the model that {package} ships is unpacked into {target}, once; this takes a while"
            print(said, file=sys.stderr, flush=True)  # to read the file's own fields takes seconds already
            _convert(package, files[0], _fields(files[0]), target)
    return target


def _convert(package: str, file: Path, fields: dict[str, Any], target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig
    from transformers.utils import logging

    deepspeed_told()
    logging.disable_progress_bar()
    tokenizer = _tokenizer(file, fields)
    with redirect_stderr(io.StringIO()):  # the dequantizer's progress bar, which no switch of transformers stops
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # otherwise saving is refused as still quantized
        )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, token_id in ids.items():
        setattr(model.config, name, token_id)
    model.generation_config = GenerationConfig(**ids)
    with cached_in(target.parent, f"the model of {package}"), publish_folder(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    names = ("pre", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "tokens")
    fields = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in names}
    return {name: field.contents() for name, field in fields.items() if field is not None}


def _tokenizer(file: Path, fields: dict[str, Any]) -> Any:
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if fields.get("pre") not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise LoadmasterError(
            f"{file.name} cuts text in the way {fields.get('pre')!r}, which is not known here (known: {known}); "
            "set model.path to the original checkpoint"
        )
    loaded = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    backend = loaded.backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[fields["pre"]] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    token = {name: fields["tokens"][fields[name]] for name in fields if name.endswith("_token_id")}
    unknown = token.get("unknown_token_id")
    eos = token["eos_token_id"]
    padding = token.get("padding_token_id")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=loaded.chat_template,
        model_max_length=8192,
        bos_token=token["bos_token_id"],
        eos_token=eos,
        unk_token=unknown,
        pad_token=unknown if padding in (None, eos) else padding,  # a pad that is also the end would be learned away
        clean_up_tokenization_spaces=False,
    )
