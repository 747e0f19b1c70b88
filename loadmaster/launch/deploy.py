"""`loadmaster deploy RUN`: the bundle's endpoint, made or brought up to date, asked, measured, or taken back.

An artifact that did not pass verification, or of which a file has changed, is not deployed. The endpoint has one name
for a recipe and format: a second deployment updates it in place. It is validated through the API that its users have;
when that fails, what this call made is deleted, and what it changed is put back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected, LoadmasterError, ProviderError
from loadmaster.export.manifest import NAME, read_manifest, verify_manifest
from loadmaster.files import read_json, write_json
from loadmaster.launch.inference import Inference, NotAnswered, answer_in
from loadmaster.launch.runpod.client import RunpodClient
from loadmaster.launch.runpod.types import CreateEndpoint, Endpoint, GpuType, UpdateEndpoint, Workers, parse

PREFIX = "loadmaster-"
FLASHBOOT_SUFFIX = " -fb"
"""The provider appends this to the name of an endpoint with FlashBoot."""
START_S = 1200.0
"""Cold start of a large model from a slow volume, with the image's first pull."""
SMOKE_TOKENS = 64
NO_SUCH_MODEL = "loadmaster-no-such-model"

Connect = Callable[[Mapping[str, str]], Inference]


@dataclass(frozen=True)
class Order:
    """What is to be deployed, checked."""

    request: CreateEndpoint
    cards: list[str]
    """Provider's names of the cards that the plan holds for."""
    served_as: str
    context: int
    usd_per_worker_hour: float
    active_workers: int
    expected: dict[str, Any]
    """The serving plan's figures."""

    @property
    def most_usd_per_hour(self) -> float:
        workers = self.request.workers.max if self.request.workers else None
        return (workers or 0) * self.usd_per_worker_hour

    @property
    def least_usd_per_hour(self) -> float:
        return self.active_workers * self.usd_per_worker_hour


def order(run_dir: Path, volume: str | None) -> Order:
    """Check the bundle, its artifact and every hash. volume: id of the network volume that holds the artifact.

    Raises ExportRejected for an artifact that is not what passed, LoadmasterError for what is missing.
    """
    bundle = run_dir / "bundle"
    if not (bundle / NAME).is_file():
        raise LoadmasterError(f"{run_dir} has no bundle: run the bundle stage first (loadmaster bundle ...)")
    manifest = read_manifest(bundle)
    artifact = bundle / manifest["serve"]["artifact"]
    if problems := verify_manifest(artifact):
        raise ExportRejected(f"{artifact} is not what was exported, so it is not deployed:\n  " + "\n  ".join(problems))
    exported = read_manifest(artifact)
    if not exported["verification"]["passed"]:
        raise ExportRejected(f"{artifact} did not pass verification, so it is not deployed")
    if exported["files"] != manifest["files"]:
        raise ExportRejected(f"{artifact} is another export than the one that was bundled: run the bundle stage again")
    if not (bundle / "endpoint.json").is_file():
        raise LoadmasterError(f"the bundle has no endpoint, and {bundle / 'README.md'} says why")
    wanted = read_json(bundle / "endpoint.json")
    request = dict(wanted["request"])
    if request["image"] is None:
        raise LoadmasterError(
            "endpoint.worker=handler needs its image: docker build -f bundle/Dockerfile -t IMAGE . in the run "
            "directory, push it, then endpoint.image=IMAGE and the bundle stage again"
        )
    if "volume_path" in wanted:
        if volume is None:
            raise LoadmasterError(
                f"the worker reads its weights from a network volume, at {wanted['volume_path']}: put the files of "
                f"{artifact} there (on a Pod the volume is /workspace), and name it with --volume ID"
            )
        request["networkVolumes"] = [volume]
    return Order(
        request=parse(CreateEndpoint, request), cards=wanted["cards"], served_as=manifest["recipe"],
        context=manifest["serve"]["max_model_len"], usd_per_worker_hour=wanted["usd_per_worker_hour"],
        active_workers=wanted["active_workers"], expected=read_json(bundle / "serving.json")["plan"],
    )  # fmt: skip


def deploy(
    wanted: Order, client: RunpodClient, connect: Connect, keep: bool = False, start_s: float = START_S,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Make or update the endpoint, validate and measure it. Returns what deployment.json holds.

    Raises NotAnswered when it does not answer (after taking back what was done, unless `keep`), ProviderError for
    the control plane's refusals.
    """
    request = wanted.request
    if volumes := request.network_volumes:
        known = client.volume(volumes[0])
        if known is None:
            raise LoadmasterError(f"there is no network volume {volumes[0]} in this account")
        request = replace(request, data_center_ids=[known.data_center])
    request = only_cards(request, wanted.cards, client.gpus("SERVERLESS"))
    before = find(client, request.name)
    if before is None:
        endpoint = client.create_endpoint(request)
        echo(f"made endpoint {endpoint.id} ({endpoint.name})")
    else:
        endpoint = client.update_endpoint(before.id, _update(request))
        echo(f"updated endpoint {endpoint.id} ({endpoint.name})")
    try:
        with connect(endpoint.request_urls) as inference:
            figures = validate(inference, wanted, start_s, echo)
    except BaseException as error:
        if keep:
            echo(f"validation failed; endpoint {endpoint.id} is kept, as asked")
        else:
            _take_back(client, endpoint, before, echo)
        if isinstance(error, NotAnswered):
            raise NotAnswered(f"{endpoint.name} does not serve as it should: {error}") from None
        raise
    return {"endpoint": endpoint.id, "name": endpoint.name, "urls": dict(endpoint.request_urls), **figures}


def _take_back(client: RunpodClient, endpoint: Endpoint, before: Endpoint | None, echo: Callable[[str], None]) -> None:
    """Delete what was made, or put back what was changed; says so when the provider does not let it."""
    try:
        if before is None:
            client.delete_endpoint(endpoint.id)
            echo(f"validation failed: endpoint {endpoint.id} is deleted")
        else:
            client.update_endpoint(before.id, _restore(before))
            echo(f"validation failed: endpoint {endpoint.id} is as it was before")
    except ProviderError as error:
        echo(
            f"validation failed, and endpoint {endpoint.id} could not be taken back ({error}); it may cost money: "
            f"loadmaster endpoint delete {endpoint.id}"
        )


def validate(
    inference: Inference, wanted: Order, start_s: float, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """A chat must be answered, a wrong model must be refused, streams are timed. Raises NotAnswered."""
    messages = [{"role": "user", "content": "Hello"}]
    most = max(1, min(SMOKE_TOKENS, wanted.context // 4))
    body = {"model": wanted.served_as, "messages": messages, "max_tokens": most, "temperature": 0}
    echo(f"asking; the first worker may take up to {start_s:.0f} s to start")
    asked = {"openai_route": "/v1/chat/completions", "openai_input": body}
    answer = answer_in(inference.ask(asked, start_s))
    if answer["model"] != wanted.served_as:
        raise NotAnswered(f"it serves {answer['model']!r}, not {wanted.served_as!r}")
    if answer["finish_reason"] not in ("stop", "length"):
        raise NotAnswered(f"the answer ended with {answer['finish_reason']!r}, not with stop or length")
    wrong = {"openai_route": "/v1/chat/completions", "openai_input": {**body, "model": NO_SUCH_MODEL}}
    try:
        inference.ask(wrong, 120)
    except NotAnswered:
        pass
    else:
        raise NotAnswered(f"it answers as {NO_SUCH_MODEL!r}, a model that does not exist, so its name means nothing")
    load = inference.load(body)
    figures = {"answer": answer, "measured": asdict(load), "planned": _planned(wanted)}
    echo(
        f"first token after {1000 * load.first_token_s:,.0f} ms (planned {_ms(wanted.expected['first_token_s'])}), "
        f"{load.tokens_per_second_each:,.0f} tokens/s an answer, {load.tokens_per_second:,.0f} with {load.at_once} at "
        f"once (a full server was planned at {_whole(wanted.expected['tokens_per_second'])})"
    )
    return figures


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
    return next((e for e in client.endpoints() if e.name.removesuffix(FLASHBOOT_SUFFIX) == name), None)


def ours(client: RunpodClient) -> list[Endpoint]:
    return [endpoint for endpoint in client.endpoints() if endpoint.name.startswith(PREFIX)]


def owned(client: RunpodClient, name: str) -> Endpoint:
    """By id or name, among those that this tool made. Raises LoadmasterError."""
    found = ours(client)
    for endpoint in found:
        if name in (endpoint.id, endpoint.name, endpoint.name.removesuffix(FLASHBOOT_SUFFIX)):
            return endpoint
    there = ", ".join(f"{e.id} ({e.name})" for e in found) or "none"
    raise LoadmasterError(f"there is no endpoint {name} made by loadmaster in this account; there are: {there}")


def scale(client: RunpodClient, endpoint: Endpoint, least: int | None, most: int | None) -> Endpoint:
    """Raises LoadmasterError when the bounds cross."""
    low = endpoint.workers.min if least is None else least
    high = endpoint.workers.max if most is None else most
    if (low or 0) > (high or 0):
        raise LoadmasterError(f"at least {low} and at most {high} workers cannot both hold")
    return client.update_endpoint(endpoint.id, UpdateEndpoint(workers=Workers(min=least, max=most)))


def key_from_environment() -> str:
    """Raises LoadmasterError where there is none."""
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if not key:
        raise LoadmasterError("RUNPOD_API_KEY is not set; the endpoint is asked with it")
    return key


def write_deployment(run_dir: Path, deployed: dict[str, Any]) -> Path:
    path = run_dir / "deployment.json"
    write_json(path, {"schema": 1, **deployed})
    return path


def _update(request: CreateEndpoint) -> UpdateEndpoint:
    """Everything that an update may change; the name stays."""
    names = {f.name for f in fields(UpdateEndpoint)} - {"name", "template_id"}
    return UpdateEndpoint(**{name: getattr(request, name) for name in names})


def _restore(before: Endpoint) -> UpdateEndpoint:
    gpu = None
    if before.gpu:
        known = ("pools", "count", "excludedTypes")
        gpu = {key: before.gpu[key] for key in known if before.gpu.get(key)}
    return parse(UpdateEndpoint, {
        "image": before.image, "env": before.env, "workers": before.workers, "scaling": before.scaling, "gpu": gpu,
        "disk": before.disk, "networkVolumes": before.network_volumes, "timeout": before.timeout,
        "dataCenterIds": before.data_center_ids, "flashboot": before.flashboot,
    })  # fmt: skip


def _planned(wanted: Order) -> dict[str, Any]:
    return {name: wanted.expected[name] for name in ("gpu", "gpus", "first_token_s", "tokens_per_second")}


def _ms(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{1000 * seconds:,.0f} ms"


def _whole(value: float | None) -> str:
    return "an unknown rate" if value is None else f"{value:,.0f} tokens/s"
