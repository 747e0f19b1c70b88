"""`loadmaster deploy RUN`, `fetch RUN` and `endpoint list|test|review|scale|delete`: words, questions, printed lines.

The parsers are built on every start of the command line, so what they run is imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadmaster.errors import LoadmasterError, ProviderError, UsageError
from loadmaster.streams import agreed
from loadmaster.words import counted

if TYPE_CHECKING:
    from loadmaster.endpoint.deploy import Order
    from loadmaster.endpoint.inference import Inference
    from loadmaster.launch.runpod.client import RunpodClient
    from loadmaster.launch.runpod.types import CreateEndpoint, NetworkVolume


def add_parsers(commands: Any) -> None:
    """Add these commands to the subparsers of the command line; each sets run(arguments) -> exit code."""
    made = commands.add_parser("deploy", help="put a run's bundle on an endpoint, validate and measure it")
    made.add_argument("run_dir", type=Path, metavar="RUN", help="run directory whose bundle stage is done")
    made.add_argument("--volume", metavar="NAME", help="network volume for the artifact, by name or id")
    made.add_argument("--name", metavar="NAME", help="of the endpoint (default: the run's own, else recipe and format)")
    made.add_argument(
        "--no-upload", action="store_true", help="the artifact is on the volume already, and is not looked at there"
    )
    made.add_argument("--yes", action="store_true", help="do not ask before anything is made")
    made.add_argument("--keep", action="store_true", help="keep the endpoint when its validation fails")
    made.add_argument("--dry-run", action="store_true", help="print the request and make nothing")
    made.set_defaults(run=_deploy)
    home = commands.add_parser("fetch", help="bring home the exports that a launched job left on its network volume")
    home.add_argument("run_dir", type=Path, metavar="RUN", help="runs/<recipe>/loadmaster-..., which the launch named")
    home.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: all that it exported")
    home.set_defaults(run=_fetch)
    endpoint = commands.add_parser(
        "endpoint", help="list, test, review, scale or delete endpoints that loadmaster made"
    )
    actions = endpoint.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="what there is, and what it may cost an hour").set_defaults(run=_list)
    test = actions.add_parser("test", help="ask and measure the endpoint of a deployed run")
    test.add_argument("run_dir", type=Path, metavar="RUN", help="run directory that was deployed")
    test.set_defaults(run=_test)
    seen = actions.add_parser("review", help="Flex or Active workers, from what it was billed")
    seen.add_argument("endpoint", help="id or name")
    hours, discount = "to look back, 2 to 2160 (default: 720)", "that you agreed on, 0.2 for 20%%"
    seen.add_argument("--hours", type=int, default=24 * 30, metavar="N", help=hours)
    seen.add_argument("--active-discount", type=float, default=0.0, metavar="SHARE", help=discount)
    seen.set_defaults(run=_review)
    size = actions.add_parser("scale", help="change the bounds of its workers")
    size.add_argument("endpoint", help="id or name")
    size.add_argument("--min", type=int, dest="least", metavar="N", help="workers that are kept up, and billed, always")
    size.add_argument("--max", type=int, dest="most", metavar="N", help="workers at most")
    size.set_defaults(run=_scale)
    gone = actions.add_parser("delete", help="delete an endpoint; the volume and its files stay")
    gone.add_argument("endpoint", help="id or name")
    gone.add_argument("--yes", action="store_true", help="do not ask")
    gone.set_defaults(run=_delete)


def _deploy(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.deploy import deploy, find, order, write_deployment
    from loadmaster.endpoint.name import replaced
    from loadmaster.training.stop import StopSignal

    wanted = order(arguments.run_dir, arguments.volume, arguments.name)
    request = wanted.request
    puts = wanted.volume is not None and not arguments.no_upload
    print(f"endpoint {request.name}: {request.image}")
    print(f"  {_described(request)}")
    if puts:
        what = f"{wanted.artifact} ({wanted.bytes / 1e9:.2f} GB)"
        how = "goes to" if wanted.left is None else "was left in"
        end = "unless it is there" if wanted.left is None else "where it is looked at"
        print(f"{what} {how} {wanted.volume_path} on volume {wanted.volume}, {end}")
    print(
        f"at least ${wanted.least_usd_per_hour:.2f}/h, at most ${wanted.most_usd_per_hour:.2f}/h "
        f"(${wanted.usd_per_worker_hour:.2f} a worker and hour while it is up, list price)"
    )
    if arguments.dry_run:
        _print_request(wanted)
        return 0
    print(f"environment: {shlex.join(f'{key}={value}' for key, value in (request.env or {}).items())}")
    put = _put(wanted) if puts else None
    _writable(arguments.run_dir)
    with _client() as client:
        there = find(client, request.name)
        print(f"it is there ({there.id}) and is updated in place" if there else "it is not there and is made")
        if there and (note := replaced(there, request)):
            print(f"ATTENTION: {note}")
        if not arguments.yes and not agreed("go on?"):
            return 0
        stop = StopSignal().install()  # from here on what was made is taken back
        try:
            deployed = deploy(wanted, client, _connect, put, keep=arguments.keep)
        finally:
            stop.uninstall()
    print(f"written: {write_deployment(arguments.run_dir, deployed)}")
    print(f"OpenAI base URL: {deployed['urls']['run'].removesuffix('/run')}/openai/v1, model {wanted.expected.model}")
    return 0


def _print_request(wanted: Order) -> None:
    """What would be sent now; without an account the request as the bundle has it, and what would be looked up."""
    import json

    from loadmaster.endpoint.deploy import changes, exact, find
    from loadmaster.endpoint.name import replaced
    from loadmaster.launch.runpod.http import KEY_VARIABLE
    from loadmaster.launch.runpod.types import body

    if not os.environ.get(KEY_VARIABLE):
        volume = "" if wanted.volume is None else f"the id and data center of volume {wanted.volume}, "
        looked_up = f"{volume}the cards of the pool today, and what is there under this name, are looked up"
        print(f"as the bundle has it; with {KEY_VARIABLE} set, {looked_up}")
        print(json.dumps(body(wanted.request), indent=2))
        return
    with _client() as client:
        request, _ = exact(wanted, client)
        before, path = find(client, request.name), f"{client.api.base_url}/serverless"
    change = request if before is None else changes(before, request)
    if change is None:
        print(f"endpoint {before.id} is as it should be; nothing would be sent")
        return
    if before is not None and (note := replaced(before, request)):
        print(f"ATTENTION: {note}")
    print(f"POST {path}" if before is None else f"PATCH {path}/{before.id}")
    print(json.dumps(body(change), indent=2))


def _described(request: CreateEndpoint) -> str:
    """Its machines and workers in a line."""
    gpu, workers = request.gpu, request.workers
    assert gpu is not None and workers is not None
    without = f" without {', '.join(gpu.excluded_types)}" if gpu.excluded_types else ""
    flashboot = "" if request.flashboot in (None, "OFF") else ", FlashBoot"
    return (
        f"{counted(gpu.count, 'GPU')} a worker of pool {', '.join(gpu.pools)}{without}; "
        f"{workers.min} to {workers.max} workers, idle for {workers.idle_timeout} s{flashboot}"
    )


def _writable(run_dir: Path) -> None:
    """Before anything is made. Raises LoadmasterError where deployment.json cannot be written."""
    if not os.access(run_dir, os.W_OK):
        raise LoadmasterError(f"{run_dir} cannot be written, and deployment.json belongs there: chmod u+w, or a copy")


def _put(wanted: Order) -> Callable[[NetworkVolume], None]:
    from loadmaster.launch.volume.bucket import Bucket, require_keys
    from loadmaster.launch.volume.fetch import look
    from loadmaster.launch.volume.upload import upload

    require_keys()  # now, and not after people have said yes

    def put(volume: NetworkVolume) -> None:
        with Bucket(volume.id, volume.data_center) as bucket:
            (upload if wanted.left is None else look)(wanted.artifact, str(wanted.volume_path), bucket)

    return put


def _fetch(arguments: argparse.Namespace) -> int:
    from loadmaster.export.manifest import exported
    from loadmaster.launch.record import on_a_volume
    from loadmaster.launch.runpod.provider import Runpod
    from loadmaster.launch.volume.bucket import require_keys
    from loadmaster.launch.volume.ended import bring_late, is_home
    from loadmaster.launch.volume.fetch import fetch, fetchable

    run_dir, formats = arguments.run_dir, arguments.formats
    left, home = on_a_volume(run_dir), is_home(run_dir)
    if home:
        fetchable(run_dir, formats)
    require_keys()
    with _client() as client, Runpod(client).bucket(str(left.volume)) as bucket:
        if not home:
            bring_late(run_dir, left, bucket)
            if not formats and not exported(run_dir):
                return 0
        fetch(run_dir, fetchable(run_dir, formats)[1], bucket, left)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.deploy import ours

    with _client() as client:
        found = ours(client)
        prices = {gpu.id: gpu for gpu in client.gpus("SERVERLESS")}
    for endpoint in found:
        workers = endpoint.workers
        pools = (endpoint.gpu or {}).get("pools", [])
        rates = [gpu.price.serverless for gpu in prices.values() if gpu.pool in pools and gpu.price.serverless]
        usd = max(rates, default=None)
        count = (endpoint.gpu or {}).get("count", 1)
        cost = "" if usd is None else f", at most ${usd * count * (workers.max or 0):.2f}/h"
        print(f"{endpoint.id}  {endpoint.name}  {workers.min} to {workers.max} workers of {count}x {pools}{cost}")
    if not found:
        print("no endpoint made by loadmaster in this account")
    return 0


def _test(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.deploy import START_S, find, order
    from loadmaster.endpoint.validate import validate

    wanted = order(arguments.run_dir, "not needed to ask")
    with _client() as client:
        endpoint = find(client, wanted.request.name)
    if endpoint is None:
        raise LoadmasterError(f"{wanted.request.name} is not deployed: loadmaster deploy {arguments.run_dir}")
    with _connect(endpoint.request_urls) as inference:
        validate(inference, wanted.expected, START_S)
    return 0


def _review(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from loadmaster.endpoint.deploy import owned
    from loadmaster.endpoint.inference import NotAnswered
    from loadmaster.endpoint.review import FEWEST_HOURS, MOST_HOURS, lines, prices_of, review, worker_hours

    if not 0 <= arguments.active_discount < 1:
        raise UsageError(f"--active-discount {arguments.active_discount:g} is no share: 0.2 is 20% off")
    if not FEWEST_HOURS <= arguments.hours <= MOST_HOURS:
        raise UsageError(f"--hours {arguments.hours}: bills are by the hour, {FEWEST_HOURS} to {MOST_HOURS} of them")
    with _client() as client:
        endpoint = owned(client, arguments.endpoint)
        bills = client.endpoint_bills(endpoint.id, arguments.hours)
        prices = prices_of(endpoint, client.gpus("SERVERLESS"), arguments.active_discount)
    least = endpoint.workers.min or 0
    measured = worker_hours(bills, prices, least, datetime.now(UTC))
    print(f"{endpoint.id} ({endpoint.name})")
    for line in lines(review(measured, prices), prices, least):
        print(line)
    try:
        with _connect(endpoint.request_urls) as inference:
            health = inference.health()
        print(f"now: jobs {_counts(health.get('jobs'))}; workers {_counts(health.get('workers'))}")
    except NotAnswered as error:
        print(f"now: not known ({error})")
    return 0


def _counts(found: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items()) if isinstance(found, dict) else "not said"


def _scale(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.deploy import owned, refuse_bounds, scale

    least, most = arguments.least, arguments.most
    refuse_bounds(least, most)
    with _client() as client:
        found = scale(client, owned(client, arguments.endpoint), least, most)
    print(f"{found.id}: {found.workers.min} to {found.workers.max} workers")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    from loadmaster.endpoint.deploy import owned

    with _client() as client:
        found = owned(client, arguments.endpoint)
        if not arguments.yes and not agreed(f"delete {found.id} ({found.name})?"):
            return 0
        client.delete_endpoint(found.id)
    print(f"deleted {found.id}")
    return 0


def _client() -> RunpodClient:
    from loadmaster.launch.runpod.client import RunpodClient

    return RunpodClient()


def _connect(urls: Mapping[str, str]) -> Inference:
    from loadmaster.endpoint.inference import Inference
    from loadmaster.launch.given import is_readable_on_the_way
    from loadmaster.launch.runpod.http import key_from_environment

    if clear := [url for url in urls.values() if url.lower().startswith("http:") and is_readable_on_the_way(url)]:
        raise ProviderError(f"the provider names {clear[0]} as the endpoint's, and without https the key is not sent")
    return Inference(urls, key_from_environment())
