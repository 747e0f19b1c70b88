"""The model's own tokenizer, which is read without what a model needs: half of what a process takes to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadmaster.errors import LoadmasterError
from loadmaster.models.libraries import OPTIONAL, without

PROBE = "We'd 2,048 of them (1999-12-31).\n\n\tdef  f(x):\r\n    return x**2  # na\u00efve \u6771\u4eac \U0001f6a2\n"
"""Words, numbers, runs of spaces, code and other scripts."""


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; it gets a padding token when it has none. Raises LoadmasterError.

    trust_remote_code=False, here and in load.py: without it transformers asks on standard input, and a y runs the code.
    """
    with without(*OPTIONAL):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if not _splits_as_its_file(tokenizer, folder / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # each kind of tokenizer fails in its own way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = "put tokenizer.json and tokenizer_config.json of the base model there (save_pretrained writes them)"
        raise LoadmasterError(f"no tokenizer can be loaded from {folder}: {reason}\n    fix: {fix}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _splits_as_its_file(tokenizer: Any, file: Path) -> bool:
    """Whether the class that tokenizer_config.json names left the rules of tokenizer.json in place.

    transformers 5 gives the file's vocabulary the class's own: Llama's, which DeepSeek's distillations name over a
    vocabulary of bytes, lose every space (transformers #45488; mended by the model's name alone, never for a folder).
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    of_a_class = isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer) is not PreTrainedTokenizerFast
    if not of_a_class or not file.is_file():
        return True
    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    return tokenizer.encode(PROBE, add_special_tokens=False) == plain.encode(PROBE, add_special_tokens=False).ids
