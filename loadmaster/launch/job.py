"""`launch=runpod`: rent the machine that the preflight picks, run there, bring the results back, terminate.

Nothing is made before the plan, the requests and the cost have been shown and agreed to. From then on every way
out of run_there() ends the machine: success, failure, a limit, Ctrl-C, an error of the provider. What this
process cannot do any more (the laptop is gone) the machine does itself; see launch/pod_bootstrap.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from loadmaster.config.compose import Composed
from loadmaster.errors import ConfigError, LoadmasterError, ProviderError, StoppedOnRequest
from loadmaster.files import write_json
from loadmaster.launch.choose import Choice, choices, counts, wanted
from loadmaster.launch.follow import Reader, unpack
from loadmaster.launch.machines import usd_so_far
from loadmaster.launch.order import deadline_hours, make_order, problems, run_folder, volume_gb, with_volume
from loadmaster.launch.provider import PREFIX, Machine, NoCapacity, Order, Provider, Volume
from loadmaster.preflight import print_plan
from loadmaster.training.stop import StopSignal

START_S = 1800.0
"""A machine whose bootstrap has not spoken after this (image pull included) is given up."""
POLL_S = 5.0
SHOWN_OFFERS = 6


@dataclass
class Launch:
    """One launch: what was agreed to, where its record lies, and what it talks to."""

    composed: Composed
    provider: Provider
    console: Console
    name: str
    folder: Path
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def echo(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def launch_job(
    composed: Composed, console: Console, provider: Provider | None = None, tokens: int | None = None
) -> int:
    """Run the job on a rented machine; returns its exit code (0, or as loadmaster.errors says).

    tokens: of one epoch of the data, for hours and dollars. provider: the one that launch.name names.
    Raises LoadmasterError when the job cannot be launched, or the machine ended without its result.
    """
    if found := problems(composed.job):
        raise ConfigError(found)
    provider = provider or provider_of(composed.job.launch.name)
    name = f"{PREFIX}{composed.job.recipe.replace('/', '-')}-{datetime.now(UTC):%m%d-%H%M%S}-{os.urandom(2).hex()}"
    folder = Path("runs") / composed.job.recipe / name
    stop = StopSignal().install()
    launch = Launch(composed, provider, console, name, folder)
    try:
        return _launch(launch, tokens)
    finally:
        stop.uninstall()


def provider_of(name: str) -> Provider:
    from loadmaster.launch.runpod.provider import Runpod

    return {"runpod": Runpod}[name]()


def _launch(launch: Launch, tokens: int | None) -> int:
    job = launch.composed.job
    gpus = wanted(job)
    offers = launch.provider.offers(list(dict.fromkeys(gpu for gpu, _ in gpus)), counts(gpus), job.launch.cloud)
    ranked = choices(job, offers, tokens)
    volume = None
    if job.launch.volume is not None:
        volume = next((v for v in launch.provider.volumes() if v.name == job.launch.volume), None)
    choice = _where_the_volume_is(ranked, volume)
    order = _order(launch, choice, volume)
    _show(launch, ranked, choice, order)
    if job.launch.dry_run:
        _print_requests(launch, choice, order)
        return 0
    _ask(launch)
    return run_there(launch, choice, _order(launch, choice, volume))  # anew: its deadline counts from now


def _where_the_volume_is(ranked: list[Choice], volume: Volume | None) -> Choice:
    if volume is None:
        return ranked[0]
    for choice in ranked:
        if not choice.offer.places or volume.place in choice.offer.places:
            return choice
    raise ProviderError(
        f"the volume {volume.name} is in {volume.place}, and none of the machines that this job fits is in stock there "
        f"({', '.join(c.offer.label for c in ranked)}); wait, or set launch.volume to a new name"
    )


def _order(launch: Launch, choice: Choice, volume: Volume | None) -> Order:
    places = (volume.place,) if volume else choice.offer.places
    return make_order(launch.composed, choice, launch.name, launch.clock(), launch.provider.api, volume, places)


# -------------------------------------------------------- before anything is made


def _show(launch: Launch, ranked: list[Choice], choice: Choice, order: Order) -> None:
    settings, hours = launch.composed.job.launch, deadline_hours(launch.composed.job.launch, choice)
    print_plan(choice.plan, launch.console)
    launch.echo("\nmachines that this job fits, best first:")
    for other in ranked[:SHOWN_OFFERS]:
        total = "" if other.usd is None else f", {other.hours:.2f} h, ${other.usd:.2f} in all"
        mark = ">" if other is choice else " "
        launch.echo(f" {mark} {other.offer.label:<14} ${other.offer.usd_per_hour:.2f}/h{total}")
    launch.echo("\nwhat will be made:")
    rate = choice.offer.usd_per_hour
    launch.echo(f"  Pod {launch.name}: {choice.offer.label}, {order.disk_gb} GB disk, {order.image}, ${rate:.2f}/h")
    if settings.volume and order.volume is None:
        size = volume_gb(settings, choice)
        launch.echo(
            f"  network volume {settings.volume}: {size} GB, about ${size * 0.07:.2f} a month until you delete it"
        )
    elif order.volume:
        launch.echo(f"  (on the network volume {order.volume.name}, {order.volume.size_gb} GB in {order.volume.place})")
    else:
        launch.echo("  no volume: the trained weights end with the Pod; only the run's small files come back")
    expected = "not known (size of the data)" if choice.usd is None else f"about ${choice.usd:.2f}"
    launch.echo(f"  cost {expected}; terminated after {hours:.2f} h at the latest, ${hours * rate:.2f}\n")


def _print_requests(launch: Launch, choice: Choice, order: Order) -> None:
    settings = launch.composed.job.launch
    requests = []
    if settings.volume and order.volume is None:
        place = next(iter(order.places or settings.data_centers), "any")
        requests.append(launch.provider.volume_request(settings.volume, volume_gb(settings, choice), place))
        order = with_volume(order, Volume("<id of the volume above>", settings.volume, 0, place))
    requests.append(launch.provider.rent_request(order))
    launch.console.out(json.dumps(requests, indent=2), highlight=False)


def _ask(launch: Launch) -> None:
    if launch.composed.job.launch.yes:
        return
    if not sys.stdin.isatty():
        raise LoadmasterError("renting needs a yes, and nobody can be asked here; add launch.yes=true")
    if launch.console.input("Rent it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise LoadmasterError("nothing was rented")


# ------------------------------------------------------------ while it is rented


def run_there(launch: Launch, choice: Choice, order: Order) -> int:
    """Rent, follow, bring back, end. Whatever happens, the machine of this name is ended before this returns."""
    launch.folder.mkdir(parents=True, exist_ok=True)
    record = {"name": launch.name, "gpu": order.offer.gpu_id, "count": order.offer.count, "image": order.image}
    record |= {"usd_per_hour": order.offer.usd_per_hour, "run_dir": run_folder(launch.composed, choice)}
    write_json(launch.folder / "launch.json", record)
    machine: Machine | None = None
    made: list[Volume] = []
    try:
        machine, order = _rent(launch, choice, order, made)
        record |= {
            "id": machine.id,
            "volume": order.volume and order.volume.id,
            "billed_usd_per_hour": machine.usd_per_hour,
        }
        write_json(launch.folder / "launch.json", record)
        launch.echo(f"rented {machine.id}; its log goes to {launch.folder / 'pod.log'}")
        limit = launch.composed.job.launch.max_usd_per_hour
        if limit is not None and machine.usd_per_hour > limit + 0.005:
            raise ProviderError(f"the Pod is billed at ${machine.usd_per_hour:.2f}/h, over max_usd_per_hour={limit:g}")
        reader = follow(launch, machine, order)
        return _result(launch, machine, reader, order)
    except StoppedOnRequest:
        raise StoppedOnRequest(f"stopped on request; {_what_stays(machine, order)}") from None
    finally:
        with _undisturbed():
            end(launch, machine, made)


def _what_stays(machine: Machine | None, order: Order) -> str:
    if machine is None or order.volume is None:
        return "nothing of it is kept"
    return "its checkpoints are on the volume, and the same command goes on from there"


def _until(launch: Launch, machine: Machine, order: Order) -> float:
    """When to end it: the deadline that the Pod carries, or earlier where it is billed at more than was quoted."""
    deadline = json.loads(order.env["LOADMASTER_JOB"])["deadline"]
    limit = launch.composed.job.launch.max_usd
    if limit is None or machine.usd_per_hour <= 0:
        return deadline
    return min(deadline, launch.clock() + limit / machine.usd_per_hour * 3600)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No Ctrl-C or SIGTERM within: an impatient finger must not leave a bill."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rent(launch: Launch, choice: Choice, order: Order, made: list[Volume]) -> tuple[Machine, Order]:
    """Try one data centre after the other; a volume that was made for one is taken back before the next."""
    settings, said = launch.composed.job.launch, ""
    needs_volume = settings.volume is not None and order.volume is None
    if not needs_volume:
        try:
            return launch.provider.rent(order), order
        except NoCapacity as error:
            said = str(error)
    for place in (order.places or tuple(settings.data_centers)) if needs_volume else ():
        made.append(launch.provider.create_volume(settings.volume, volume_gb(settings, choice), place))
        try:
            placed = with_volume(order, made[-1])
            return launch.provider.rent(placed), placed
        except NoCapacity as error:
            said = str(error)
            launch.provider.delete_volume(made.pop().id)
    raise ProviderError(
        f"{order.offer.label} could not be rented: {said or 'no data centre has it in stock'}. Try again, name other "
        "machines with launch.gpus, or see whether the request itself is at fault (launch.dry_run=true)"
    )


def follow(launch: Launch, machine: Machine, order: Order) -> Reader:
    """Read the log to its end event; raises LoadmasterError when the machine, or the time, ends without one."""
    reader, start, until = Reader(), launch.clock(), _until(launch, machine, order)
    with open(launch.folder / "pod.log", "a", encoding="utf-8") as log:
        while reader.ended is None:
            broken = ""
            try:
                for line in launch.provider.log(machine.id, reader.newest):
                    _take(launch, machine, reader, line, log, start)
                    if reader.ended is not None or launch.clock() > until:
                        break
            except ProviderError as error:
                broken = str(error)
            if reader.ended is not None:
                break
            now = launch.clock()
            if now >= until:
                raise LoadmasterError(
                    f"{(now - start) / 3600:.2f} h are over (launch.max_hours, launch.max_usd); the job was told to "
                    f"save a checkpoint before; {_what_stays(machine, order)}"
                )
            if not reader.armed and now - start > START_S:
                raise ProviderError(
                    f"the Pod has not started the job after {START_S / 60:.0f} minutes; does the entry point of "
                    f"{launch.composed.job.launch.image} run its arguments, and has it python3?"
                )
            present = launch.provider.machine(machine.id)
            if present is None or not present.alive:
                state = "is gone" if present is None else f"is {present.status}"
                raise ProviderError(
                    f"the Pod {state}, and its job had not ended; its log is {log.name}" + (broken and f" ({broken})")
                )
            launch.sleep(POLL_S)
    return reader


def _take(launch: Launch, machine: Machine, reader: Reader, line, log, start: float) -> None:
    said = reader.take(line)
    if isinstance(said, str):
        log.write(f"{line.at} {said}\n")
        log.flush()
        launch.echo(f"  | {said}")
    elif said is not None and said["event"] == "step":
        hours = (launch.clock() - start) / 3600
        loss = "" if said.get("loss") is None else f", loss {said['loss']:.4f}"
        of = f" of {said['steps']}" if said.get("steps") else ""
        launch.echo(f"  step {said['step']}{of}{loss}; {hours:.2f} h, ${hours * machine.usd_per_hour:.2f} so far")
    elif said is not None and said["event"] != "end":
        log.write(f"{line.at} {json.dumps(said)}\n")
        log.flush()


def _result(launch: Launch, machine: Machine, reader: Reader, order: Order) -> int:
    """Unpack what came back and say where the rest is; the job's own exit code."""
    assert reader.ended is not None
    packed = reader.files() if reader.ended["parts"] else b""
    if packed is None:
        launch.echo("the small files did not come through the log whole; they are in the run directory on the volume")
    elif packed:
        names = unpack(packed, launch.folder)
        launch.echo(f"brought back {len(names)} files to {launch.folder}")
    for name in reader.ended.get("left", []):
        launch.echo(f"  too large to come back through the log: {name}")
    if order.volume is not None:
        job = json.loads(order.env["LOADMASTER_JOB"])
        launch.echo(f"weights and exports are on the volume {order.volume.name} ({order.volume.id}): {job['run_dir']}")
    if said := reader.ended.get("said"):
        launch.echo(said)
    cost = usd_so_far(machine, datetime.fromtimestamp(launch.clock(), UTC))
    launch.echo(f"the job ended with exit code {reader.ended['exit_code']}; about ${cost:.2f} for the machine")
    return int(reader.ended["exit_code"])


def end(launch: Launch, machine: Machine | None, made: list[Volume]) -> None:
    """Terminate everything of this launch's name; without a machine, take back the volumes made for it (empty).

    By name too: a request that broke half way may have made what this process never heard of.
    """
    try:
        if machine is not None:
            launch.provider.terminate(machine.id)
        _end_by_name(launch)
        if machine is None:
            launch.sleep(POLL_S)  # what was asked for may still be on its way
            _end_by_name(launch)
            for volume in made:
                launch.provider.delete_volume(volume.id)
    except ProviderError as error:
        launch.echo(
            f"\nATTENTION: it is not certain that the Pod {launch.name} has ended ({error}). It ends itself at its "
            "deadline; `loadmaster pods` shows it, `loadmaster pods sweep --all` ends it"
        )
        return
    launch.echo(f"terminated {launch.name}; nothing of it is left running")


def _end_by_name(launch: Launch) -> None:
    for found in launch.provider.machines():
        if found.name == launch.name:
            launch.provider.terminate(found.id)
