"""How a rented job ended whose last words were not heard, and its small files: read on its network volume.

A machine that ends itself takes its log along, as it does while a laptop sleeps. But each node writes its end down
before it says it, in a folder of the volume that this launch alone uses, and the volume outlives the machine.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadmaster.errors import LoadmasterError, ProviderError
from loadmaster.files import read_json
from loadmaster.launch.board import KILLED
from loadmaster.launch.context import Launch
from loadmaster.launch.machines import usd_so_far
from loadmaster.launch.order import FILES, ROOM, is_small_file
from loadmaster.launch.provider import MOUNT, Machine, Order, Provider
from loadmaster.launch.record import Left, record_of
from loadmaster.launch.volume.bucket import KEY_VARIABLES, Bucket, has_keys, reachable
from loadmaster.launch.volume.fetch import Echo
from loadmaster.words import counted


class Unheard(ProviderError):
    """The machine, or its time, is over, and nothing was heard of its job's end."""


@dataclass(frozen=True)
class End:
    code: int
    said: tuple[str, ...]
    at: datetime


def heard(launch: Launch, provider: Provider, machine: Machine, order: Order, error: Unheard) -> int:
    """Exit code of a job that ended unheard, its small files brought home. The machine is gone by then.

    Raises ProviderError where it had not ended, or where that cannot be known from here.
    """
    volume, run_dir = order.volume, order.job["run_dir"]
    if volume is None:
        raise ProviderError(f"{error}. How its job ended is not known: without a volume nothing of it is kept")
    left = Left(volume.id, run_dir)
    where = (
        f"Whether and how its job ended is to be read on the volume {volume.name} ({volume.id}), in "
        f"{jobs_folder(order.name)}, and what it made in {left.folder}"
    )
    if not reachable(volume.place):
        raise ProviderError(
            f"{error}. {where}: on a Pod that mounts it, as volumes in {volume.place} have no S3 API. The same command "
            "goes on from what is there"
        )
    again = f"`loadmaster fetch {launch.folder}` brings that home, and the same command goes on from what is there"
    if not has_keys():
        raise ProviderError(f"{error}. {where}; with the S3 API key in {' and '.join(KEY_VARIABLES)} {again}")
    try:
        with provider.bucket(volume.id) as bucket:
            end = ended(bucket, order.name, order.offer.nodes)
            names = [] if end is None else bring_home(bucket, left, launch.folder)
    except LoadmasterError as unknown:
        raise ProviderError(f"{error}. {where}, but was not to be read ({unknown}); {again}") from None
    if end is None:
        raise ProviderError(
            f"{error}. The volume {volume.name} ({volume.id}) has no end of it either: the same command goes on from "
            "its last checkpoint"
        )
    launch.echo(f"{error}; it had ended before, says the volume {volume.name} ({volume.id})")
    launch.echo(f"brought back {counted(len(names), 'file')} to {launch.folder}; the run directory there is {run_dir}")
    for said in end.said:
        launch.echo(said)
    cost = usd_so_far(machine, min(end.at, datetime.fromtimestamp(launch.clock(), UTC)))
    launch.echo(f"the job ended with exit code {end.code}; about ${cost:.2f} for the machine until then")
    return end.code


def jobs_folder(name: str) -> str:
    """Of that launch, on the volume."""
    return f"{ROOM.removeprefix(f'{MOUNT}/')}/jobs/{name}"


def ended(bucket: Bucket, name: str, nodes: int) -> End | None:
    """As its nodes wrote it down; None where none did. As of a job that is followed, the first failure says most."""
    folder = jobs_folder(name)
    there = bucket.entries(folder)
    found: dict[int, tuple[int, str | None, datetime]] = {}
    with tempfile.TemporaryDirectory() as room:
        for node in range(nodes):
            if entry := there.get(f"{folder}/ended-{node}.json"):
                path = Path(room) / f"{node}.json"
                bucket.bring(f"{folder}/ended-{node}.json", path, entry.bytes)
                try:
                    code, said = read_json(path)
                    found[node] = int(code), said, entry.modified
                except (ValueError, TypeError):
                    raise ProviderError(f"{folder}/ended-{node}.json on volume {bucket.volume} is damaged") from None
    failed = [code for code, _, _ in sorted(found.values(), key=lambda node: node[2]) if code != 0]
    if 0 not in found and not failed:
        return None
    first = found[0][0] if 0 in found else failed[0]
    code = failed[0] if first in KILLED else first
    said = tuple(f"node {n}: {s}" if nodes > 1 else s for n, (_, s, _) in found.items() if s)
    return End(code, said, max(at for _, _, at in found.values()))


def is_home(folder: Path) -> bool:
    """Whether a launch's small files are in its folder here."""
    return any(path.is_file() for pattern in FILES for path in folder.glob(pattern))


def bring_home(bucket: Bucket, left: Left, folder: Path) -> list[str]:
    """The run directory's small files, as they come through the log of a job that is followed; returns their names."""
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".coming-", dir=folder) as room:  # all of them, or none
        for name, entry in bucket.entries(left.folder).items():
            short = name.removeprefix(f"{left.folder}/")
            if is_small_file(short):
                bucket.bring(name, Path(room) / short, entry.bytes)
                names.append(short)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(room) / name, folder / name)
    return names


def bring_late(run_dir: Path, left: Left, bucket: Bucket, echo: Echo = print) -> None:
    """The small files of a launch that nobody followed to its end. Raises LoadmasterError where it has not ended."""
    record = record_of(run_dir)
    end = ended(bucket, record["name"], int(record.get("nodes") or 1))
    if end is None:
        raise LoadmasterError(
            f"the job of {run_dir} has not ended, says the volume {bucket.volume}: `loadmaster pods` shows whether it "
            "still runs; if not, its launch's command goes on from its last checkpoint"
        )
    names = bring_home(bucket, left, run_dir)
    echo(f"brought back {counted(len(names), 'file')} to {run_dir}")
    for said in end.said:
        echo(said)
    echo(f"the job ended with exit code {end.code}, {end.at:%Y-%m-%d %H:%M} UTC")
