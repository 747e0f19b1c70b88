"""`launch=NAME`: a job goes to other machines. What is common, and what happens before any machine is rented.

`launch=runpod` rents the machine that the preflight picks, runs there, brings the results back and terminates
(rented.py); `launch=ssh` and `launch=slurm` use machines that are there. Nothing is made before the plan, the
requests and the cost have been shown and agreed to.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from loadmaster import catalog
from loadmaster.config.compose import Composed
from loadmaster.errors import ConfigError, LoadmasterError, ProviderError, StoppedOnRequest
from loadmaster.hub import is_gated
from loadmaster.launch.check import problems
from loadmaster.launch.choose import Choice, choices, counts, nodes_of, wanted
from loadmaster.launch.context import Launch
from loadmaster.launch.machines import listed_provider_of, orphan, provider_of, run_dir
from loadmaster.launch.order import deadline_hours, make_order, run_folder, volume_gb, with_volume
from loadmaster.launch.payload import packed_files
from loadmaster.launch.provider import PREFIX, Machine, Order, Provider, Volume
from loadmaster.launch.record import is_deployed_from_a_volume, on_a_volume
from loadmaster.launch.rented import run_there
from loadmaster.launch.slurm import run_by_slurm
from loadmaster.launch.ssh import run_by_ssh
from loadmaster.launch.volume.bucket import KEY_VARIABLES, has_keys, reachable, require_keys, url_of
from loadmaster.launch.volume.ended import bring_late, is_home
from loadmaster.launch.volume.fetch import fetch, fetchable
from loadmaster.preflight import print_plan
from loadmaster.training.stop import StopSignal

SHOWN_OFFERS = 6
SHOWN_CHARACTERS = 2000
PAYLOAD = "LOADMASTER_PAYLOAD"
KEYS = " and ".join(KEY_VARIABLES)


def launch_job(
    composed: Composed, console: Console, provider: Provider | None = None, tokens: int | None = None
) -> int:
    """Run the job where launch says; returns its exit code (0, or as loadmaster.errors says).

    tokens: of one epoch of the data, for hours and dollars. provider: of rented machines, the one that launch.name
    names. Raises LoadmasterError when the job cannot be launched, or the machines ended without its result.
    """
    from loadmaster.data import refuse_bad_rows  # not for every command that this module is imported by

    if found := problems(composed):
        raise ConfigError(found)
    refuse_bad_rows(composed.job, console.print)
    name = f"{PREFIX}{composed.job.recipe.replace('/', '-')}-{datetime.now(UTC):%m%d-%H%M%S}-{os.urandom(2).hex()}"
    folder = Path("runs") / composed.job.recipe / name
    # A job in a queue outlives the login that it was sent from; what is rented, or ends with the connection, does not.
    stop = StopSignal().install(hangup=composed.job.launch.name != "slurm")
    launch = Launch(composed, console, name, folder, stop)
    try:
        if composed.job.launch.name == "ssh":
            return run_by_ssh(launch, tokens)
        if composed.job.launch.name == "slurm":
            return run_by_slurm(launch, tokens)
        if provider is None and composed.job.launch.dry_run:
            provider = listed_provider_of(composed.job.launch.name)
        return _rent(launch, provider or provider_of(composed.job.launch.name), tokens)
    finally:
        stop.uninstall()


def _rent(launch: Launch, provider: Provider, tokens: int | None) -> int:
    job = launch.composed.job
    gpus = wanted(job)
    names, nodes = list(dict.fromkeys(gpu for gpu, _ in gpus)), nodes_of(job)
    offers = provider.offers(names, counts(gpus), job.launch.cloud, nodes, job.launch.force_pods)
    ranked = choices(job, offers, tokens)
    volume = None
    if job.launch.volume is not None:
        volume = _volume_called(job.launch.volume, provider.volumes())
    choice = _where_the_volume_is(ranked, volume)
    order = _order(launch, provider, choice, volume)
    if (job.launch.fetch or order.uploads) and not job.launch.dry_run:
        require_keys()  # now, and not when the job is over
    _refuse_small(volume, volume_gb(job.launch, choice))
    _show(launch, provider, ranked, choice, order)
    if volume is not None:
        _refuse_a_second(provider.machines(), run_folder(launch.composed, choice))
    if job.launch.dry_run:
        _print_requests(launch, provider, choice, order)
        return 0
    _ask(launch)
    code = run_there(launch, provider, choice, order)
    if job.launch.fetch and code == 0:
        _fetch(launch, provider)
    if code == 0 and is_deployed_from_a_volume(launch.folder):
        launch.echo(f"next: loadmaster deploy {launch.folder} --dry-run (what an endpoint would cost)")
    return code


def _refuse_a_second(machines: list[Machine], folder: str) -> None:
    """Two jobs in one run directory would write each other's files. Raises LoadmasterError."""
    now = datetime.now(UTC)
    for machine in machines:
        if run_dir(machine) == folder and not orphan(machine, now):
            raise LoadmasterError(
                f"this very job on this very data runs already, in the same run directory, on {machine.kind} "
                f"{machine.name}: wait for it, end it (loadmaster pods sweep {machine.name}), or change the job"
            )


def _refuse_small(volume: Volume | None, needed_gb: int) -> None:
    """A disk that is full at hour three. What else lies on it is not known. Raises LoadmasterError."""
    if volume is not None and volume.size_gb < needed_gb:
        raise LoadmasterError(
            f"the network volume {volume.name} ({volume.id}) has {volume.size_gb} GB, and this run needs {needed_gb} "
            f"GB: make it larger in the provider's console, launch.volume=NAME makes another one, or "
            f"launch.volume_gb={volume.size_gb} says that it is enough"
        )


def _fetch(launch: Launch, provider: Provider) -> None:
    """The exports, once the machine costs nothing any more. Raises LoadmasterError; the files stay on the volume."""
    done, again = "the job is done and its exports are on the volume", f"`loadmaster fetch {launch.folder}` goes on"
    try:
        left = on_a_volume(launch.folder)
        with provider.bucket(str(left.volume)) as bucket:
            if not is_home(launch.folder):  # the log lost them
                bring_late(launch.folder, left, bucket, launch.echo)
            fetch(launch.folder, fetchable(launch.folder, None)[1], bucket, left, launch.echo)
    except StoppedOnRequest:
        raise StoppedOnRequest(f"stopped on request; {done}: {again}") from None
    except LoadmasterError as error:
        raise LoadmasterError(f"{done}, but did not come: {error}; {again}") from None


def _volume_called(name: str, volumes: list[Volume]) -> Volume | None:
    """By name or id; None: it is to be made. Raises LoadmasterError where several have that name."""
    found = [volume for volume in volumes if name in (volume.name, volume.id)]
    if len(found) > 1:
        there = ", ".join(f"{volume.id} ({volume.size_gb} GB in {volume.place})" for volume in found)
        raise LoadmasterError(
            f"several network volumes are called {name}: {there}. launch.volume=ID says which; delete the other one in "
            "the provider's console, as it costs money"
        )
    return found[0] if found else None


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


def _order(launch: Launch, provider: Provider, choice: Choice, volume: Volume | None) -> Order:
    places = (volume.place,) if volume else choice.offer.places
    can_upload = has_keys() or launch.composed.job.launch.dry_run
    order = make_order(launch.composed, choice, launch.name, launch.clock(), provider.api, volume, places, can_upload)
    if launch.composed.job.launch.fetch or order.uploads:
        order = replace(order, places=_with_a_way_home(places, launch.composed.job.launch.data_centers))
    return order


def _with_a_way_home(places: tuple[str, ...], asked: list[str]) -> tuple[str, ...]:
    """Those whose volumes can be reached from here. Raises LoadmasterError where none can."""
    found = tuple(place for place in places or asked if reachable(place))
    if not found and (places or asked):
        url_of((places or tuple(asked))[0])
    return found


# -------------------------------------------------------- before anything is made


def _show(launch: Launch, provider: Provider, ranked: list[Choice], choice: Choice, order: Order) -> None:
    settings, hours = launch.composed.job.launch, deadline_hours(launch.composed.job.launch, choice)
    print_plan(choice.plan, launch.console)
    launch.echo("\nmachines that this job fits, best first:")
    if provider.not_asked:
        launch.echo(f"  ({provider.not_asked})")
    for other in ranked[:SHOWN_OFFERS]:
        total = "" if other.usd is None else f", {other.hours:.2f} h, ${other.usd:.2f} in all"
        mark = ">" if other is choice else " "
        halfway = "" if other.can_export else "; trains there, but its exports will not pass"
        launch.echo(f" {mark} {other.offer.label:<14} {other.offer.rate}{total}{halfway}")
    launch.echo("\nwhat will be made:")
    rate = choice.offer.usd_per_hour
    kind = "Pod" if choice.offer.nodes == 1 else "Pods" if order.plain else "Instant Cluster"
    made = f"{choice.offer.label}, {order.disk_gb} GB disk, {order.image}, {choice.offer.rate}"
    launch.echo(f"  {kind} {launch.name}: {made}")
    if kind == "Pods":
        launch.echo("  plain Pods: 100 Mbit/s between them; the plan's speed and cost are for a cluster's network")
    if kind == "Instant Cluster":
        launch.echo("  (at the list price of Pods; its own rate is known, and held to the limits, once it is there)")
    if settings.volume and order.volume is None:
        size = volume_gb(settings, choice)
        month = size * catalog.prices()["storage"]["network_volume_usd_per_gb_month"]
        launch.echo(f"  network volume {settings.volume}: {size} GB, about ${month:.2f} a month until you delete it")
    elif order.volume:
        launch.echo(f"  (on the network volume {order.volume.name}, {order.volume.size_gb} GB in {order.volume.place})")
    else:
        launch.echo("  no volume: the trained weights end with the Pod; only the run's small files come back")
    model = launch.composed.job.model.name
    if is_gated(model) and "HF_TOKEN" not in (settings.secrets or {}):
        launch.echo(f"  {model} is gated on the Hub: without launch.secrets.HF_TOKEN=NAME (a secret of your account")
        launch.echo("  there, of a token that may read it) it cannot be downloaded")
    for upload in order.uploads:
        launch.echo(f"  {upload.path.name} ({upload.bytes / 1e6:.1f} MB) goes to the volume first, as {upload.name}")
    if (order.uploads or settings.fetch) and not has_keys():
        launch.echo(f"  it is rented once {KEYS} hold the provider's S3 API key: files go to")
        launch.echo("  the volume, and come from it, with that key (console: Settings, S3 API Keys)")
    about, more = ("at least", " or more") if choice.offer.is_of_community else ("about", "")
    expected = "not known (size of the data)" if choice.usd is None else f"{about} ${choice.usd:.2f}"
    launch.echo(f"  cost {expected}; terminated after {hours:.2f} h at the latest, ${hours * rate:.2f}{more}")
    if choice.hours is not None and choice.hours > hours:
        left = "a checkpoint is kept, and the same command goes on" if settings.volume else "no weights are left of it"
        launch.echo(f"  by the plan it takes {choice.hours:.2f} h: it is ended before it is done; {left}")
    launch.echo("")


def _print_requests(launch: Launch, provider: Provider, choice: Choice, order: Order) -> None:
    settings = launch.composed.job.launch
    requests = []
    if settings.volume and order.volume is None:
        unknown = "<a data center with the machine in stock>" if provider.not_asked else "any"
        place = next(iter(order.places or settings.data_centers), unknown)
        requests.append(provider.volume_request(settings.volume, volume_gb(settings, choice), place))
        order = with_volume(order, Volume("<id of the volume above>", settings.volume, 0, place))
    requests += provider.rent_requests(order)
    if launch.console.is_terminal:
        requests = [_shortened(request) for request in requests]
    launch.console.out(json.dumps(requests, indent=2), highlight=False)


def _shortened(request: dict[str, Any]) -> dict[str, Any]:
    """Packed files are pages of base64: on a terminal, which they are and how much of it says more."""
    env = request["body"].get("env", {})
    long = {name: value for name, value in env.items() if len(value) > SHOWN_CHARACTERS or name == PAYLOAD}
    short = {
        name: f"{value[:20]}... ({len(value):,} characters, whole in a pipe{_within(name, value)})"
        for name, value in long.items()
    }
    return {**request, "body": {**request["body"], **({"env": env | short} if env else {})}}


def _within(name: str, value: str) -> str:
    """The files that a packed variable holds, where it is the job's own."""
    if name != PAYLOAD:
        return ""
    return ": " + ", ".join(f"{file} {size / 1e3:,.1f} kB" for file, size in packed_files(value).items())


def _ask(launch: Launch) -> None:
    if launch.composed.job.launch.yes:
        return
    if not sys.stdin.isatty():
        raise LoadmasterError("renting needs a yes, and nobody can be asked here; add launch.yes=true")
    try:
        answer = input("Rent it? [y/N] ")
    except EOFError:  # Ctrl-D
        answer = "no"
    if answer.strip().lower() not in ("y", "yes"):
        raise LoadmasterError("nothing was rented")
