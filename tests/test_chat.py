"""Talking to what a run trained: the same words as evaluation's, over several turns, and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadmaster import chat_command
from loadmaster.cli import main
from loadmaster.config.shipped import resolve_path
from loadmaster.data import Conversation
from loadmaster.errors import LoadmasterError
from loadmaster.evaluation import generate
from loadmaster.export.loading import load_export
from loadmaster.models.load import load_base, load_trained
from loadmaster.models.tokenizer import load_tokenizer
from tests.test_pipeline import go

SYSTEM = {"role": "system", "content": "Answer in JSON."}
ROW = json.loads(Path(resolve_path("shipped:tickets/train.jsonl")).read_text().splitlines()[0])
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    code, output = go(
        tiny, folder, "recipe=lora_8b", "stop_after=export", "optimizer.lr=1e-2", f"data.system={SYSTEM['content']}"
    )
    assert code == 0, output
    return folder / "run"


def said(model, tokenizer, *messages) -> str:
    return generate(model, tokenizer, [Conversation(list(messages))], 6, 1)[0]


def typed(monkeypatch, *lines):
    words = iter(lines)

    def line(prompt):
        found = next(words, EOFError)
        if isinstance(found, type):
            raise found
        return found

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)


def test_each_kind_of_weights_answers_as_it_does_in_evaluation(run, tiny, capsys):
    tokenizer, answers = load_tokenizer(tiny), {}
    for words, model in (
        ((), load_trained(tiny, run / "adapter", torch.float32, "cpu")),
        (("--base",), load_base(tiny, torch.float32, "cpu").eval()),
        (("--format", "bf16"), load_export(run / "export" / "bf16", "cpu")),
    ):
        assert main(["chat", str(run), "--message", "Hello", "--max-new-tokens", "6", *words]) == 0
        answers[words] = capsys.readouterr().out
        assert answers[words] == said(model, tokenizer, SYSTEM, HELLO) + "\n"
    assert answers[()] != answers["--base",]


def test_a_conversation_goes_on_until_it_is_cleared(run, tiny, monkeypatch, capsys):
    typed(monkeypatch, "Hello", "And now?", "", "/clear", "And now?", "/exit", "never read")
    assert main(["chat", str(run), "--max-new-tokens", "6", "--system", ""]) == 0
    model, tokenizer = load_trained(tiny, run / "adapter", torch.float32, "cpu"), load_tokenizer(tiny)
    first, now = said(model, tokenizer, HELLO), {"role": "user", "content": "And now?"}
    second = said(model, tokenizer, HELLO, {"role": "assistant", "content": first}, now)
    assert capsys.readouterr().out == "\n".join([first, second, said(model, tokenizer, now), ""])


def test_an_answer_that_is_stopped_is_forgotten(run, tiny, monkeypatch, capsys):
    module = sys.modules["loadmaster.evaluation.generate"]
    stopped, answer = [], module.answer

    def once(*arguments):
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(module, "answer", once)
    typed(monkeypatch, "What?", "Hello")
    assert main(["chat", str(run), "--max-new-tokens", "6", "--system", ""]) == 0
    model = load_trained(tiny, run / "adapter", torch.float32, "cpu")
    assert capsys.readouterr().out.rstrip("\n") == said(model, load_tokenizer(tiny), HELLO)


def test_without_words_of_ones_own_the_system_message_is_the_first_rows(run, tiny, tmp_path, capsys):
    for name in ("adapter", "plan.json", "stages.json"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text().replace(f"system: {SYSTEM['content']}", ""))
    assert main(["chat", str(tmp_path), "--message", "Hello", "--max-new-tokens", "6"]) == 0
    model, of_rows = load_trained(tiny, run / "adapter", torch.float32, "cpu"), ROW["messages"][0]
    out, err = capsys.readouterr()
    assert out == said(model, load_tokenizer(tiny), of_rows, HELLO) + "\n"
    assert f"(--system TEXT for another): {of_rows['content']}" in err


def test_what_is_piped_in_is_one_message(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", str(run), "--max-new-tokens", "6"]) == 0
    piped = capsys.readouterr().out
    main(["chat", str(run), "--max-new-tokens", "6", "--message", "Hello"])
    assert capsys.readouterr().out == piped
    assert main(["chat", str(run), "--message", "Hello", "--temperature", "5", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out != piped


@pytest.mark.parametrize(
    "words, code, reason",
    [
        (["--message", "a " * 3000], 4, "leave no room for an answer in the 2,048 that the model knows"),
        (["--message", " "], 2, "no message to answer"),
        (["--message", "caf\udce9"], 2, "no UTF-8 text"),
        (["--message", "Hello", "--system", "caf\udce9"], 2, "no UTF-8 text"),
        (["--format", "fp8", "--message", "Hello"], 5, "has no export fp8; it has bf16"),
        (["--format", "gguf", "--message", "Hello"], 4, "llama-cli -m"),
        (["Hello"], 2, "--message TEXT takes the message"),
    ],
)
def test_what_is_refused(run, capsys, words, code, reason):
    assert main(["chat", str(run), *words]) == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "piped, reason",
    [(None, "no message to answer"), (io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"), "no UTF-8 text")],
)
def test_what_is_piped_in_is_refused_before_a_model_is_loaded(piped, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr("sys.stdin", piped)
    assert main(["chat", str(tmp_path)]) != 0
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["-1", "1e-40", "nan", "inf", "warm"])
def test_a_temperature_is_one_that_scores_can_be_divided_by(temperature, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "runs", "--temperature", temperature])
    assert "is no temperature: 0, or 0.01 or more" in capsys.readouterr().err


def test_an_export_that_was_brought_home_is_asked_without_its_base(run, tiny, tmp_path, capsys):
    for name in ("export", "plan.json", "stages.json"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(tiny), "/nowhere/base"))
    words = ["--message", "Hello", "--max-new-tokens", "6"]
    assert main(["chat", str(tmp_path), "--format", "bf16", *words]) == 0
    model = load_export(run / "export" / "bf16", "cpu")
    assert capsys.readouterr().out == said(model, load_tokenizer(tiny), SYSTEM, HELLO) + "\n"
    assert main(["chat", str(tmp_path), *words]) != 0
    assert "or ran elsewhere; it has exports: bf16 (--format)" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--base", *words]) != 0
    assert "/nowhere/base is not a folder" in capsys.readouterr().err


def test_memory_that_runs_out_in_an_answer_is_told_and_rows_that_are_gone_too(run, tmp_path, monkeypatch, capsys):
    for name in ("adapter", "plan.json", "stages.json"):
        (tmp_path / name).symlink_to(run / name)
    config = (run / "config.yaml").read_text().replace(f"system: {SYSTEM['content']}", "")
    (tmp_path / "config.yaml").write_text(config.replace("shipped:tickets/train.jsonl", "gone.jsonl"))

    def full(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(sys.modules["loadmaster.evaluation.generate"], "answer", full)
    assert main(["chat", str(tmp_path), "--message", "Hello"]) != 0
    said = capsys.readouterr().err
    assert "training rows cannot be read here" in said and "too little memory for so long a conversation" in said


def test_an_adapter_that_fits_nothing_in_its_base_is_told_in_a_sentence(run, tmp_path, capsys):
    for name in ("config.yaml", "plan.json", "stages.json"):
        (tmp_path / name).symlink_to(run / name)
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": r".*\.gone\d"}))
    assert main(["chat", str(tmp_path), "--message", "Hello"]) == 4
    said = capsys.readouterr().err
    assert "adapter does not load: Target modules .*\\.gone\\d not found in the base model" in said
    assert "fix: put its files back" in said


@pytest.mark.parametrize(("name", "fix"), [
    ("torchao.float8", "pip install --force-reinstall torchao, in the version that"), (None, "install what it names"),
])
def test_a_library_that_is_broken_is_no_fault_of_the_folder(name, fix):
    error = ImportError("cannot import name 'x' from 'torchao.float8'", name=name)
    with pytest.raises(LoadmasterError) as raised, chat_command._said_in_a_sentence(Path("adapter")):
        raise error
    assert str(raised.value).startswith("a library cannot be imported here: cannot import name 'x'")
    assert f"fix: {fix}" in str(raised.value)


def test_lines_that_end_in_any_way_are_lines():
    assert chat_command._as_text("one\rtwo\r\nthree\n") == "one\ntwo\nthree\n"


def test_a_folder_that_is_no_run_and_a_run_without_weights_are_refused(run, tmp_path, capsys):
    assert main(["chat", str(run.parent), "--message", "Hello"]) != 0
    assert f"the newest that was trained is {run}" in capsys.readouterr().err
    for name in ("config.yaml", "plan.json", "stages.json"):
        shutil.copy(run / name, tmp_path)
    assert main(["chat", str(tmp_path), "--message", "Hello"]) != 0
    assert "its train stage is not done" in capsys.readouterr().err


def test_a_run_that_has_nothing_to_talk_to_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "config.yaml").touch()
    code = "import sys; from loadmaster.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "chat", str(tmp_path), "--message", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "has no trained weights: its train stage is not done" in done.stderr


def test_loading_is_said_and_what_libraries_say_of_it_is_not(run, monkeypatch, capsys):
    def noisy(*arguments):
        print("Decompressing model: 100%", file=sys.stderr)
        return load_export(*arguments)

    monkeypatch.setattr("loadmaster.export.loading.load_export", noisy)
    assert main(["chat", str(run), "--format", "bf16", "--message", "Hello", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err == "loading the model\n"
