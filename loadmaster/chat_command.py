"""`loadmaster chat RUN`: talk to what a run trained, or to one of its exports, before anything serves it."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from textwrap import shorten
from typing import Any

from loadmaster import hub
from loadmaster.config.schema import Job
from loadmaster.errors import LoadmasterError, UsageError
from loadmaster.out_of_memory import ran_out
from loadmaster.rundir import RunDir, newest_meant
from loadmaster.words import visible

LEAST_TEMPERATURE = 0.01
"""Below, what scores are divided by takes them beyond a float."""
SAID_CHARACTERS = 300
"""Of a library's error: one of tensors that do not fit names every one of them."""
HELP = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="talk to what a run trained, or to one of its exports",
        usage="loadmaster chat RUN [--format FORMAT | --base] [--message TEXT] [--system TEXT] ...",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN", help="run directory whose train stage is done")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--format", metavar="FORMAT", help="an exported format (default: the weights as trained)")
    which.add_argument("--base", action="store_true", help="the model before training")
    command.add_argument("--message", metavar="TEXT", help="answer this and end (default: what is typed or piped in)")
    command.add_argument("--system", metavar="TEXT", help="system message (default: as in training; '' for none)")
    command.add_argument(
        "--max-new-tokens", type=_tokens, default=512, metavar="N", help="longest answer, tokens (default 512)"
    )
    command.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T",
        help="draw tokens (default 0: the likeliest one, so the same answer each time)",
    )
    command.set_defaults(run=chat, takes_words=True)


def chat(asked: argparse.Namespace, unknown: list[str]) -> int:
    """Answer on standard output, as the tokens come; what is not the model's goes to standard error.

    Raises UsageError for words that are none of chat's and a message that is no text, LoadmasterError for a run without
    trained weights and a message that leaves the model no room to answer in, ExportRejected for a format that is not
    there or not as it was exported.
    """
    if unknown:
        raise UsageError(f"chat does not know {' '.join(unknown)}; --message TEXT takes the message")
    if not os.path.isfile(asked.run_dir / "config.yaml"):  # no error for a name that is too long, as Path's own is
        newest = newest_meant(asked.run_dir, "adapter", "model")
        give = f"the newest that was trained is {newest}" if newest else "give one whose train stage is done"
        raise LoadmasterError(f"{asked.run_dir} is no run directory: {give}")
    text = _message(asked)
    hub.settle()
    asked.run_dir = asked.run_dir.absolute()
    model, tokenizer, system = _loaded(asked)
    talk = Talk(model, tokenizer, system, asked)
    if text is not None:
        talk.say(text)
        return 0
    _tell(HELP)
    for text in _typed():
        if text == "/clear":
            talk.clear()
        elif text:
            try:
                talk.say(_as_text(text))
            except KeyboardInterrupt:
                _tell("\n(stopped; this message and its answer are forgotten)")
            except LoadmasterError as error:
                _tell(str(error))
    return 0


def _message(asked: argparse.Namespace) -> str | None:
    """What is to be answered; None where somebody is there to type it."""
    _as_text(asked.system or "")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the words of a command line
    if asked.message is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    text = asked.message
    if text is None:
        text = sys.stdin.read().strip() if sys.stdin is not None else ""
    if not text.strip():
        raise UsageError("there is no message to answer: --message TEXT, or text on standard input")
    return _as_text(text)


def _as_text(text: str) -> str:
    """With its lines ended as those of a file that is piped in."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("what is said has bytes that are no UTF-8 text") from None
    return text


class Talk:
    """One conversation with a model; each answer is part of what the next one continues."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, asked: argparse.Namespace):
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        if system and not tokenizer.chat_template:
            raise LoadmasterError("this model has no chat template, so no system message: it goes on with a text")
        self.before = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self.messages = list(self.before)

    def say(self, text: str) -> str:
        """The answer, printed as it comes. What is stopped or refused leaves the conversation as it was."""
        from loadmaster.evaluation.generate import answer, stop_ids

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages, text)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.asked.max_new_tokens if longest is None else longest - len(prompt)
        if room < 1:
            raise LoadmasterError(
                f"{len(prompt):,} tokens leave no room for an answer in the {longest:,} that the model knows"
            )
        try:
            ids = answer(
                self.model, self.tokenizer, prompt, min(room, self.asked.max_new_tokens), self.asked.temperature,
                _printer(self.tokenizer, set(stop_ids(self.model, self.tokenizer))),
            )
        except RuntimeError as error:
            if not ran_out(error):
                raise
            fix = "/clear, a shorter message, or a smaller --max-new-tokens"
            raise LoadmasterError(f"the GPU has too little memory for so long a conversation: {fix}") from error
        said = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if self.tokenizer.chat_template:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        return said

    def _prompt(self, messages: list[dict[str, Any]], text: str) -> list[int]:
        from jinja2 import TemplateError

        from loadmaster.data import Conversation
        from loadmaster.evaluation.generate import prompt_ids

        try:
            asked = Conversation(messages) if self.tokenizer.chat_template else Conversation([], text=text)
            return prompt_ids(self.tokenizer, asked)
        except TemplateError as error:
            raise LoadmasterError(f"the chat template refuses this conversation: {error}") from None


def _printer(tokenizer: Any, stops: set[int]) -> Any:
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    return Printer(tokenizer, skip_prompt=True, clean_up_tokenization_spaces=False)


def _loaded(asked: argparse.Namespace) -> tuple[Any, Any, str | None]:
    """(model, tokenizer, system message)."""
    folder = _weights(asked)  # before libraries that take seconds to load
    _tell("loading the model")

    from transformers.utils import logging

    from loadmaster.config.compose import read_job
    from loadmaster.export.loading import load_adapter, load_export
    from loadmaster.export.room import beside_weights, spread_over
    from loadmaster.export.served.check import folder_of_paths
    from loadmaster.models.frozen import frozen_form, round_inputs
    from loadmaster.models.load import DTYPES, load_base, load_trained
    from loadmaster.models.resolve import resolve_base
    from loadmaster.models.tokenizer import load_tokenizer
    from loadmaster.preflight.plan import Plan
    from loadmaster.world_stages import device_type

    logging.set_verbosity_error()
    job, plan = read_job(asked.run_dir / "config.yaml", to_run=False).job, Plan.read(asked.run_dir / "plan.json")
    by_itself = folder is not None and not (folder / "adapter_config.json").is_file()
    with chdir(folder_of_paths(asked.run_dir)):
        system = _system(job) if asked.system is None else asked.system
        base = folder if by_itself else resolve_base(job.model).absolute()
    spread = spread_over(device_type(plan, job.hardware.gpu), None, *beside_weights(plan), 0.0)
    with _said_in_a_sentence(folder or base), redirect_stderr(io.StringIO()):  # libraries' warnings and bars
        if asked.format is not None:
            model = load_export(folder, spread) if by_itself else load_adapter(base, folder, spread)
            return model, load_tokenizer(folder), system
        how: dict[str, Any] = {
            "dtype": DTYPES[plan.precision], "device": spread, "frozen": frozen_form(plan.method, plan.precision)
        }
        model = load_base(base, **how).eval() if folder is None else load_trained(base, folder, **how)
        round_inputs(model, False)
        return model, load_tokenizer(base), system


@contextmanager
def _said_in_a_sentence(folder: Path) -> Iterator[None]:
    """A folder that does not load, which may hold anything: libraries raise whatever they come upon."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoadmasterError) or ran_out(error):
            raise
        why = shorten(str(error) or type(error).__name__, SAID_CHARACTERS)
        if isinstance(error, ImportError):  # which says nothing of the folder
            from loadmaster.packages import again

            raise LoadmasterError(f"a library cannot be imported here: {why}\n    fix: {again(error)}") from error
        fix = "put its files back as they were written; --format FORMAT and --base load others"
        raise LoadmasterError(f"{folder} does not load: {why}\n    fix: {fix}") from error


def _weights(asked: argparse.Namespace) -> Path | None:
    """The folder of the weights that are asked for; None for those of the base."""
    from loadmaster.export.manifest import exported

    if asked.base:
        return None
    if asked.format == "gguf":
        raise LoadmasterError(f"llama.cpp runs it: llama-cli -m {asked.run_dir / 'export' / 'gguf'}/*.gguf")
    if asked.format is not None:
        from loadmaster.export.served.check import exported as as_exported

        as_exported(asked.run_dir, [asked.format])
        return asked.run_dir / "export" / asked.format
    if not (run := RunDir(asked.run_dir, "")).holds_trained():
        made = f"; it has exports: {', '.join(names)} (--format)" if (names := exported(asked.run_dir)) else ""
        why = f"its train stage is not done, or ran elsewhere{made}"
        raise LoadmasterError(f"{asked.run_dir} has no trained weights: {why}")
    return run.trained


def _system(job: Job) -> str | None:
    """What conversations began with in training: data.system, or else the first row's own system message."""
    from loadmaster.data.reading import first_conversation

    if job.data.system:
        return job.data.system
    first = first_conversation(job)
    if first is None:
        _tell("the training rows cannot be read here, so there is no system message (--system TEXT for one)")
        return None
    if not first.messages or first.messages[0]["role"] != "system":
        return None
    system = first.messages[0]["content"]
    _tell(f"system message of the first training row (--system TEXT for another): {visible(system)}")
    return system


def _tokens(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: 1 or more")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value and not LEAST_TEMPERATURE <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature: 0, or {LEAST_TEMPERATURE} or more")
    return value


def _typed() -> Iterator[str]:
    """Lines that somebody types, until the end of input or /exit."""
    import readline  # noqa: F401  lines can be edited, and earlier ones fetched

    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text in ("/exit", "/quit"):
            return
        yield text


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
