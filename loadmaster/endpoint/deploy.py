"""`loadmaster deploy RUN`: the bundle's endpoint, made or brought up to date, asked, measured, or taken back.

    check      an artifact that did not pass verification, or of which a file has changed, is not deployed
    upload     its files go to the network volume, what is there already is compared; those that a launched job left on
               its volume are looked at there (launch/volume/)
    make       the endpoint has one name for a recipe and format, or the one that is given: a second deployment updates
               the first (where that was another job's, this is said before), and one that changes nothing sends nothing
    validate   through the API that its users have (validate.py)
    take back  when that fails, what this call made is deleted, and what it changed is put back

The endpoint carries its image and environment itself, as v2 allows: a template would be one more thing to leave behind.
Files on the volume stay: they cost nothing beside the volume, and the next try does not send them again.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loadmaster.endpoint.inference import Inference, NotAnswered
from loadmaster.endpoint.name import SERVES, deployed_name, endpoint_called, origin
from loadmaster.endpoint.validate import Expected, validate
from loadmaster.errors import ExportRejected, LoadmasterError, ProviderError, UsageError
from loadmaster.export.manifest import NAME, read_manifest, verify_manifest
from loadmaster.export.served.record import NAME as SERVED
from loadmaster.export.served.record import checked_figures
from loadmaster.files import read_json, write_json
from loadmaster.given_run import SUCH_AS
from loadmaster.launch.context import undisturbed
from loadmaster.launch.provider import LATE_LOOKS, PREFIX
from loadmaster.launch.record import Left, away, copied_by
from loadmaster.launch.runpod.client import RunpodClient, asked_for
from loadmaster.launch.runpod.types import (
    CreateEndpoint,
    Endpoint,
    GpuType,
    NetworkVolume,
    UpdateEndpoint,
    Workers,
    body,
    parse,
)
from loadmaster.rundir import newest_in, newest_meant
from loadmaster.words import counted

START_S = 1200.0
"""Cold start of a large model from a slow volume, with the image's first pull."""
POLL_S = 5.0

Connect = Callable[[Mapping[str, str]], Inference]
Put = Callable[[NetworkVolume], Any]


@dataclass(frozen=True)
class Order:
    """What is to be deployed, checked."""

    request: CreateEndpoint
    cards: list[str]
    """Provider's names of the cards that the plan holds for."""
    artifact: Path
    left: Left | None
    """Where its files are, when a launched job left them there; None: here."""
    volume: str | None
    """Id or name of the network volume that the worker reads; None: the image holds the weights."""
    volume_path: str | None
    """Folder of the artifact there."""
    bytes: int
    """Of the artifact."""
    usd_per_worker_hour: float
    active_workers: int
    expected: Expected

    @property
    def most_usd_per_hour(self) -> float:
        workers = self.request.workers.max if self.request.workers else None
        return (workers or 0) * self.usd_per_worker_hour

    @property
    def least_usd_per_hour(self) -> float:
        return self.active_workers * self.usd_per_worker_hour


def order(run_dir: Path, volume: str | None, name: str | None = None) -> Order:
    """Check the bundle, its artifact and every hash. volume: id or name of the network volume for the artifact; None:
    the one on which a launched job left it. name: of the endpoint, None: that of the endpoint which this run was
    deployed to, else after recipe and format.

    Raises ExportRejected for an artifact that is not what passed, LoadmasterError for what is missing or damaged.
    """
    try:
        return _order(run_dir, volume, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON that is cut, or of another shape
        raise LoadmasterError(
            f"{run_dir / 'bundle'} is damaged, or of another version of loadmaster ({type(error).__name__}): run the "
            f"bundle stage again (loadmaster bundle {shlex.quote(str(run_dir))})"
        ) from None


def _order(run_dir: Path, volume: str | None, name: str | None) -> Order:
    bundle = run_dir / "bundle"
    if not os.path.isfile(bundle / NAME):
        if not os.path.isdir(run_dir):
            newest = newest_meant(run_dir, "bundle")
            give = f"the newest run of that recipe with a bundle is {newest}" if newest else f"give a run, {SUCH_AS}"
            raise LoadmasterError(f"there is no folder {run_dir}: {give}")
        for run in run_dir.resolve().parents[:2]:
            if (run / "bundle" / NAME).is_file():
                raise LoadmasterError(f"{run_dir} is a part of a run: give the run directory, {run}")
        if run := newest_in(run_dir):
            raise LoadmasterError(f"{run_dir} is no run directory: give one of those in it, the newest is {run}")
        raise LoadmasterError(f"{run_dir} has no bundle: loadmaster bundle {shlex.quote(str(run_dir))} writes it")
    manifest = read_manifest(bundle)
    artifact = Path(os.path.normpath(bundle / manifest["serve"]["artifact"]))
    left = away(run_dir, artifact)
    if left is not None and left.volume is None:
        raise LoadmasterError(f"the files of {artifact} are not here; first {copied_by(left, run_dir)}")
    if left is None and (problems := verify_manifest(artifact)):
        raise ExportRejected(f"{artifact} is not what was exported, so it is not deployed:\n  " + "\n  ".join(problems))
    exported = read_manifest(artifact)
    if not exported["verification"]["passed"]:
        raise ExportRejected(f"{artifact} did not pass verification, so it is not deployed")
    if (served := checked_figures(run_dir, exported)) and not served["passed"]:
        wrong = f"{'; '.join(served['failures'])} ({run_dir / SERVED})"
        raise ExportRejected(f"{artifact} was served by a real server and is not what was trained: {wrong}")
    if exported["files"] != manifest["files"]:
        raise ExportRejected(f"{artifact} is another export than the one that was bundled: run the bundle stage again")
    if not (bundle / "endpoint.json").is_file():
        raise LoadmasterError(f"the bundle has no endpoint, and {bundle / 'README.md'} says why")
    if not (bundle / "smoke.json").is_file():
        raise LoadmasterError(f"{bundle} is of an earlier version of loadmaster: run the bundle stage again")
    wanted, plan, smoke = (read_json(bundle / f"{name}.json") for name in ("endpoint", "serving", "smoke"))
    request = wanted["request"]
    if request["image"] is None:
        raise LoadmasterError(
            "endpoint.worker=handler needs its image: docker build -f bundle/Dockerfile -t IMAGE . in the run "
            "directory, push it, then endpoint.image=IMAGE and the bundle stage again"
        )
    request["name"] = endpoint_called(name) if name is not None else deployed_name(run_dir) or request["name"]
    request["env"] = {**(request.get("env") or {}), SERVES: origin(manifest)}
    path = wanted.get("volume_path")
    if left is not None and path is None:
        raise LoadmasterError(
            f"the image is to hold the weights of {artifact}, and they are not here: loadmaster fetch {run_dir}"
        )
    volume = volume or (left and left.volume)
    if path is not None and volume is None:
        raise UsageError(
            f"the worker reads its weights from a network volume, at {path}, where the files of {artifact} go first: "
            f"`loadmaster deploy {run_dir} --volume NAME`, by name or id (the provider's console makes one)"
        )
    if path is not None:
        request["networkVolumes"] = [volume]
    return Order(
        request=parse(CreateEndpoint, request), cards=wanted["cards"], artifact=artifact, left=left,
        volume=volume if path is not None else None, volume_path=path, bytes=manifest["bytes"],
        usd_per_worker_hour=wanted["usd_per_worker_hour"], active_workers=wanted["active_workers"],
        expected=Expected(
            manifest["recipe"], manifest["serve"]["max_model_len"], smoke["prompts"], plan["load"],
            wanted["max_slowdown"],
        ),
    )


def deploy(
    wanted: Order, client: RunpodClient, connect: Connect, put: Put | None = None, keep: bool = False,
    start_s: float = START_S, echo: Callable[[str], None] = print, sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Upload, make or update the endpoint, validate and measure it. Returns what deployment.json holds.

    put: brings the artifact to the volume it is given, or looks at it there; None: it is there already. Raises
    NotAnswered when the endpoint does not answer as it should (after taking back what was done, unless `keep`),
    ProviderError for the refusals of the control plane and of the volume.
    """
    request, volume = exact(wanted, client)
    before = find(client, request.name)
    if volume is not None and put is not None:
        put(volume)
    change = None if before is None else changes(before, request)
    made: Endpoint | None = None
    try:
        if before is None:
            endpoint = made = client.create_endpoint(request)
            _alone(client, made)
            echo(f"made endpoint {endpoint.id} ({endpoint.name})")
        elif change is not None:
            endpoint = client.update_endpoint(before.id, change)
            echo(f"updated endpoint {endpoint.id} ({endpoint.name})")
            _settled(client, endpoint.id, start_s, echo, sleep)
        else:
            endpoint = before
            echo(f"endpoint {endpoint.id} ({endpoint.name}) is as it should be; nothing is sent")
        with connect(endpoint.request_urls) as inference:
            found = validate(inference, wanted.expected, start_s, echo)
        if made is not None:
            _end_twins(client, made, echo)
    except BaseException as error:
        if keep:
            echo(f"validation failed; endpoint {request.name} is kept, as asked")
        elif before is None or change is not None:
            with undisturbed():
                _take_back(client, request.name, before, made, echo, sleep)
        if isinstance(error, NotAnswered):
            raise NotAnswered(f"{request.name} does not serve as it should: {error}") from None
        raise
    return {"endpoint": endpoint.id, "name": endpoint.name, "urls": dict(endpoint.request_urls), **found}


def exact(wanted: Order, client: RunpodClient) -> tuple[CreateEndpoint, NetworkVolume | None]:
    """The request as it is sent: with the volume's id and data center, and without the cards that its pools hold today
    besides. Raises LoadmasterError where the volume is none of this account, or not the one with the files."""
    request, volume = wanted.request, None
    if wanted.volume is not None:
        volume = volume_of(client, wanted.volume)
        if wanted.left is not None and volume.id != wanted.left.volume:
            raise LoadmasterError(
                f"the files are on volume {wanted.left.volume}, not on {wanted.volume}: leave --volume out; or bring "
                "them home with `loadmaster fetch RUN`, and they are uploaded from here"
            )
        request = replace(request, network_volumes=[volume.id], data_center_ids=[volume.data_center])
    return only_cards(request, wanted.cards, client.gpus("SERVERLESS")), volume


def _alone(client: RunpodClient, made: Endpoint) -> None:
    """Raises LoadmasterError where another deployment of the same bundle made its endpoint at the same moment.

    Whoever sees the other one and is not older gives way, so at most one stays.
    """
    for twin in _twins(client, made):
        if twin.created_at <= made.created_at:
            raise LoadmasterError(
                f"somebody else deployed {made.name} at this moment (endpoint {twin.id}): start again when that is "
                "over; it is then updated in place"
            )


def _end_twins(client: RunpodClient, made: Endpoint, echo: Callable[[str], None]) -> None:
    """Delete what a lost request made late: nobody would ask it, and its Active workers would be billed. Whoever
    deploys the same bundle at the same moment, and is younger, has given way by now."""
    for twin in _twins(client, made):
        if twin.created_at >= made.created_at:
            client.delete_endpoint(twin.id)
            echo(f"endpoint {twin.id} is deleted: made twice, by one request")


def _twins(client: RunpodClient, made: Endpoint) -> list[Endpoint]:
    return [e for e in client.endpoints() if asked_for(e.name) == asked_for(made.name) and e.id != made.id]


def _take_back(
    client: RunpodClient, name: str, before: Endpoint | None, made: Endpoint | None, echo: Callable[[str], None],
    sleep: Callable[[float], None],
) -> None:
    """Delete what was made, or put back what was changed; says so when the provider does not let it."""
    try:
        if before is not None:
            client.update_endpoint(before.id, _restore(before))
            echo(f"failed: endpoint {before.id} is as it was before")
        elif there := made or _found_late(client, name, sleep):
            client.delete_endpoint(there.id)
            echo(f"failed: endpoint {there.id} is deleted")
    except ProviderError as error:
        echo(
            f"failed, and endpoint {name} could not be taken back ({error}); it may cost money: "
            f"loadmaster endpoint delete {name}"
        )


def _found_late(client: RunpodClient, name: str, sleep: Callable[[float], None]) -> Endpoint | None:
    """By its name, where the answer to its creation was lost, or not waited for: it may still be on its way."""
    for _ in range(LATE_LOOKS):
        if there := find(client, name):
            return there
        sleep(POLL_S)
    return find(client, name)


def _settled(
    client: RunpodClient, id: str, wait_s: float, echo: Callable[[str], None], sleep: Callable[[float], None]
) -> None:
    """Wait until no worker of before the update is left: it would answer for the new ones."""
    deadline, said = time.monotonic() + wait_s, False
    while old := [worker for worker in client.workers(id) if worker.is_stale]:
        if time.monotonic() > deadline:
            raise NotAnswered(f"{counted(len(old), 'worker')} of before the update still there after {wait_s:.0f} s")
        if not said:
            echo(f"waiting for {counted(len(old), 'worker')} of before the update to end")
            said = True
        sleep(POLL_S)


def volume_of(client: RunpodClient, name: str) -> NetworkVolume:
    """By id or name. Raises LoadmasterError where there is none, or several of that name."""
    volumes = client.volumes()
    found = [volume for volume in volumes if name in (volume.id, volume.name)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{volume.id} ({volume.name}, {volume.data_center})" for volume in volumes) or "none"
    if found:
        raise LoadmasterError(f"several network volumes are called {name}: give the id of one of {there}")
    raise LoadmasterError(
        f"there is no network volume {name} in this account; there are: {there}. A run with launch=runpod makes one, "
        "and so does the provider's console"
    )


def only_cards(request: CreateEndpoint, cards: list[str], live: list[GpuType]) -> CreateEndpoint:
    """Exclude every other card that the pools hold today (the service refuses a name that is in none of them).

    Raises LoadmasterError where they hold none of `cards`.
    """
    assert request.gpu is not None
    members = {gpu.id for gpu in live if gpu.pool in request.gpu.pools}
    if not members & set(cards):
        raise LoadmasterError(
            f"the provider's pool {', '.join(request.gpu.pools)} has no {' or '.join(cards)} today (it has "
            f"{', '.join(sorted(members)) or 'nothing'}): choose another endpoint.gpu and bundle again"
        )
    return replace(request, gpu=replace(request.gpu, excluded_types=sorted(members - set(cards)) or None))


def find(client: RunpodClient, name: str) -> Endpoint | None:
    """The endpoint of that name, FlashBoot or not."""
    return next((e for e in client.endpoints() if asked_for(e.name) == asked_for(name)), None)


def ours(client: RunpodClient) -> list[Endpoint]:
    return [endpoint for endpoint in client.endpoints() if endpoint.name.startswith(PREFIX)]


def owned(client: RunpodClient, name: str) -> Endpoint:
    """By id or name, among those that this tool made. Raises LoadmasterError where there is none, or several."""
    endpoints = ours(client)
    found = [e for e in endpoints if name in (e.id, e.name, asked_for(e.name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise LoadmasterError(f"several endpoints are called {name}: give the id, {' or '.join(e.id for e in found)}")
    there = ", ".join(f"{e.id} ({e.name})" for e in endpoints) or "none"
    raise LoadmasterError(f"there is no endpoint {name} made by loadmaster in this account; there are: {there}")


def refuse_bounds(least: int | None, most: int | None) -> None:
    """Raises UsageError for numbers of workers that cannot be, before anybody is asked."""
    if least is None and most is None:
        raise UsageError("nothing to change: give --min, --max or both")
    if min(least or 0, most or 0) < 0:
        raise UsageError("a number of workers is 0 or more: --min 0 --max 3")
    if least is not None and most is not None and least > most:
        raise UsageError(f"at least {least} and at most {most} workers cannot both hold: --min {most} --max {least}")


def scale(client: RunpodClient, endpoint: Endpoint, least: int | None, most: int | None) -> Endpoint:
    """Raises LoadmasterError when the bounds cross, or cross those that are there."""
    refuse_bounds(least, most)
    low = endpoint.workers.min if least is None else least
    high = endpoint.workers.max if most is None else most
    if (low or 0) > (high or 0):
        raise LoadmasterError(f"at least {low} and at most {high} workers cannot both hold")
    return client.update_endpoint(endpoint.id, UpdateEndpoint(workers=Workers(min=least, max=most)))


def write_deployment(run_dir: Path, deployed: dict[str, Any]) -> Path:
    path = run_dir / "deployment.json"
    write_json(path, {"schema": 1, **deployed})
    return path


def changes(before: Endpoint, request: CreateEndpoint) -> UpdateEndpoint | None:
    """What brings `before` to `request` (the name stays); None: it is there already."""
    wanted = UpdateEndpoint(**{field.name: getattr(request, field.name) for field in fields(UpdateEndpoint)})
    now, then = body(wanted), body(_restore(before))
    return None if all(_same(value, then.get(key)) for key, value in now.items()) else wanted


def _same(wanted: Any, there: Any) -> bool:
    """Whether `there` has all that is wanted; what is not said is the service's."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(_same(value, there.get(key)) for key, value in wanted.items())
    return wanted == there


def _restore(before: Endpoint) -> UpdateEndpoint:
    gpu = None
    if before.gpu:
        known = ("pools", "count", "excludedTypes", "minCudaVersion")
        gpu = {key: before.gpu[key] for key in known if before.gpu.get(key)}
    return parse(UpdateEndpoint, {
        "image": before.image, "env": before.env, "workers": before.workers, "scaling": before.scaling, "gpu": gpu,
        "disk": before.disk, "networkVolumes": before.network_volumes, "timeout": before.timeout,
        "dataCenterIds": before.data_center_ids, "flashboot": before.flashboot,
    })
