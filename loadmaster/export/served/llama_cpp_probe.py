"""Run by the interpreter of llama.cpp's own environment (cyllama, numpy); nothing of loadmaster is there.

    python -I llama_cpp_probe.py SPEC

spec: model (a .gguf file), documents (ids, positions), texts (name -> rendered conversation), prompts (token ids of
each), max_new_tokens, stop_ids, threads, result (the file that the answer is written to).
"""

import json
import sys
from pathlib import Path

import numpy as np
from cyllama.llama import llama_cpp as llama


class Loaded(llama.LlamaModel):
    """With the attribute that cyllama 0.2.18's get_logits_ith asks its model for, and that it does not have."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


class Model:
    def __init__(self, path: str, longest: int, threads: int):
        llama.disable_logging()
        llama.ggml_backend_load_all()
        self.model = Loaded(path, llama.LlamaModelParams(), verbose=False)
        self.vocabulary = self.model.get_vocab()
        how = llama.LlamaContextParams()
        how.n_ctx = how.n_batch = how.n_ubatch = longest
        how.n_threads = how.n_threads_batch = threads
        self.context = llama.LlamaContext(self.model, how, verbose=False)
        self.longest = longest

    def log_probabilities(self, ids: list[int], positions: list[int]) -> np.ndarray:
        """[positions, vocabulary]: of the token at each position, given those before it."""
        self.context.kv_cache_clear()
        self._feed(ids, 0, {at - 1 for at in positions})
        logits = np.array([self.context.get_logits_ith(at - 1) for at in positions], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def answer(self, prompt: list[int], max_new_tokens: int) -> tuple[list[int], bool]:
        """(greedy token ids with the one that ended it, whether one did)."""
        self.context.kv_cache_clear()
        self._feed(prompt, 0, {len(prompt) - 1})
        at, said = len(prompt) - 1, []
        while len(said) < max_new_tokens:
            said.append(int(np.argmax(self.context.get_logits_ith(at))))
            if self.vocabulary.is_eog(said[-1]):
                return said, True
            self._feed(said[-1:], len(prompt) + len(said) - 1, {0})
            at = 0
        return said, False

    def _feed(self, ids: list[int], position: int, wanted: set[int]) -> None:
        batch = llama.LlamaBatch(n_tokens=self.longest, embd=0, n_seq_max=1)
        for index, token in enumerate(ids):
            batch.add(token, position + index, [0], index in wanted)
        self.context.decode(batch)


def main(path: str) -> None:
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    lengths = [len(each["ids"]) for each in told["documents"]]
    lengths += [len(ids) + told["max_new_tokens"] for ids in told["prompts"]]
    model = Model(told["model"], max(lengths), told["threads"])
    documents = []
    for document in told["documents"]:
        log_p = model.log_probabilities(document["ids"], document["positions"])
        own = [float(row[document["ids"][at]]) for row, at in zip(log_p, document["positions"], strict=True)]
        documents.append({"own": own, "top": np.argmax(log_p, axis=1).tolist()})
    answers = [model.answer(ids, told["max_new_tokens"]) for ids in told["prompts"]]
    vocabulary = model.vocabulary
    answer = {
        "documents": documents,
        "answers": [{"ids": ids, "ended": ended} for ids, ended in answers],
        # Special tokens are read as such, and none is put in front: the text has what the template puts there.
        "tokens": {name: list(vocabulary.tokenize(text, False, True)) for name, text in told["texts"].items()},
        "template": model.model.meta_val_str("tokenizer.chat_template") if told["texts"] else None,
        "adds_bos": bool(vocabulary.get_add_bos()),
        "ends": {str(token): bool(vocabulary.is_eog(token)) for token in told["stop_ids"]},
        "name": model.model.meta_val_str("general.name"),
    }
    Path(told["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
