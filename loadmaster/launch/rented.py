"""A job on rented machines: rent, follow the logs of all nodes, bring back, end.

From the first request on every way out of run_there() ends the machine: success, failure, a limit, Ctrl-C, an
error of the provider. What this process cannot do any more (the laptop is gone) the machine does itself; see
launch/pod_bootstrap.py. Where it is back only after that, the volume says how the job ended (volume/ended.py).
Several nodes are one machine here, which is made, billed and ended as a whole.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

from loadmaster.errors import ProviderError, StoppedOnRequest
from loadmaster.files import write_json
from loadmaster.launch.board import Board, log_file
from loadmaster.launch.choose import Choice
from loadmaster.launch.context import Launch, undisturbed
from loadmaster.launch.machines import orphan, run_dir, usd_so_far
from loadmaster.launch.order import dated, run_folder, volume_gb, with_volume
from loadmaster.launch.provider import LATE_LOOKS, LogLine, Machine, NoAnswer, NoCapacity, Order, Provider, Volume
from loadmaster.launch.volume.ended import Unheard, heard
from loadmaster.rundir import LAUNCH_RECORD

START_S = 1800.0
"""A machine whose bootstrap has not spoken after this (image pull included) is given up."""
POLL_S = 5.0
LEAVE_S = 2.0
HEAR_OUT_S = 5.0
NODE_GRACE_S = 120.0
"""After one node has failed, so long for the first one to end by itself and hand back its files."""


def run_there(launch: Launch, provider: Provider, choice: Choice, order: Order) -> int:
    """Rent, follow, bring back, end. Whatever happens, the machine of this name is ended before this returns."""
    launch.folder.mkdir(parents=True, exist_ok=True)
    offer = order.offer
    record = {"name": launch.name, "gpu": offer.gpu_id, "count": offer.count, "nodes": offer.nodes}
    record |= {"image": order.image, "usd_per_hour": offer.usd_per_hour}
    record |= {"run_dir": run_folder(launch.composed, choice)}
    write_json(launch.folder / LAUNCH_RECORD, record)
    machine: Machine | None = None
    made: list[Volume] = []
    followed: _Followed | None = None
    unheard: Unheard | None = None
    looks = LATE_LOOKS
    try:
        machine, order = _rent(launch, provider, choice, order, made)
        record |= {"id": machine.id, "kind": machine.kind, "volume": order.volume and order.volume.id}
        record |= {"billed_usd_per_hour": machine.usd_per_hour}
        write_json(launch.folder / LAUNCH_RECORD, record)
        launch.echo(f"rented {machine.kind} {machine.id}; its log goes to {launch.folder / 'pod.log'}")
        followed = _Followed(launch, provider, machine, order)
        return followed.to_the_end()
    except Unheard as error:
        unheard = error
    except ProviderError as error:
        looks = LATE_LOOKS if isinstance(error, NoAnswer) else 0
        raise
    except StoppedOnRequest:
        raise StoppedOnRequest(f"stopped on request; {_what_stays(machine, order)}") from None
    finally:
        with undisturbed():
            end(launch, provider, machine, made, looks)
            if followed is not None:
                followed.leave()
    assert followed is not None
    return heard(launch, provider, followed.billed(), order, unheard)


def _what_stays(machine: Machine | None, order: Order) -> str:
    if machine is None or order.volume is None:
        return "nothing of it is kept"
    return "its checkpoints are on the volume, and the same command goes on from there"


def _rent(
    launch: Launch, provider: Provider, choice: Choice, order: Order, made: list[Volume]
) -> tuple[Machine, Order]:
    """Try one data centre after the other; a volume that was made for one is taken back before the next."""
    settings, said = launch.composed.job.launch, ""
    needs_volume = settings.volume is not None and order.volume is None
    if not needs_volume:
        try:
            order = _uploaded(launch, provider, order)
            return provider.rent(order), order
        except NoCapacity as error:
            said = str(error)
    for place in (order.places or tuple(settings.data_centers)) if needs_volume else ():
        made.append(provider.create_volume(settings.volume, volume_gb(settings, choice), place))
        try:
            placed = _uploaded(launch, provider, with_volume(order, made[-1]))
            return provider.rent(placed), placed
        except NoCapacity as error:
            said = str(error)
            provider.delete_volume(made.pop().id)
    raise ProviderError(
        f"{order.offer.label} could not be rented: {said or 'no data centre has it in stock'}. Try again, name other "
        "machines with launch.gpus, or see whether the request itself is at fault (launch.dry_run=true)"
    )


def _uploaded(launch: Launch, provider: Provider, order: Order) -> Order:
    """Bring the data to the volume while no machine costs anything; what is there is left alone. The hours of the order
    count from then."""
    if order.uploads:
        assert order.volume is not None
        with provider.bucket(order.volume.id) as bucket:
            for upload in order.uploads:
                sent = bucket.put(upload.path, upload.name, upload.sha256)
                launch.echo(f"{upload.name} is on the volume ({sent / 1e6:.1f} MB were sent)")
    return dated(order, launch.clock())


class _Followed:
    """A rented machine while its job runs. A thread a node reads its log; all else happens in the caller's."""

    def __init__(self, launch: Launch, provider: Provider, machine: Machine, order: Order):
        self.launch, self.provider, self.machine, self.order = launch, provider, machine, order
        self.lines: queue.Queue[tuple[int, LogLine | str]] = queue.Queue()
        self.leaving = threading.Event()
        self.unanswered = False
        self.alone = False
        """Whether it is known that no other machine runs this job."""
        self.silent_at = 0.0
        """When the provider last did not answer, by the clock that stands still while a laptop sleeps."""
        self.threads: list[threading.Thread] = []

    def to_the_end(self) -> int:
        """The job's exit code; raises LoadmasterError when the machine, or the time, ends without one."""
        launch, nodes = self.launch, self.order.offer.nodes
        with (
            log_file(launch.folder / "pod.log") as log,
            Board(launch, log, nodes, self._rate()) as self.board,
        ):
            self._hold_to_limit()
            for node in range(nodes):
                self.threads.append(threading.Thread(target=self._read, args=(node,), daemon=True))
                self.threads[-1].start()
            self._follow()
            self._hear_out()
        code = self.board.result(launch.folder)
        if self.order.volume is not None:
            volume, there = self.order.volume, self.order.job["run_dir"]
            launch.echo(f"the run directory is on the volume {volume.name} ({volume.id}): {there}")
        cost = usd_so_far(self.billed(), datetime.fromtimestamp(launch.clock(), UTC))
        launch.echo(f"the job ended with exit code {code}; about ${cost:.2f} for the machine")
        return code

    def leave(self) -> None:
        """Once the machine has ended, its logs have: wait for those who read them."""
        self.leaving.set()
        for thread in self.threads:
            thread.join(LEAVE_S)

    def billed(self) -> Machine:
        return replace(self.machine, usd_per_hour=self._rate())

    def _rate(self) -> float:
        """As billed; while the provider does not say, as quoted."""
        return self.machine.usd_per_hour or self.order.offer.usd_per_hour

    def _read(self, node: int) -> None:
        """In a thread: the node's lines, from the newest on after each broken connection."""
        reader = self.board.readers[node]
        while not self.leaving.is_set() and reader.ended is None:
            broken = ""
            try:
                for line in self.provider.log(self.machine, node, reader.newest):
                    self.lines.put((node, line))
                    if self.leaving.is_set():
                        return
            except ProviderError as error:
                broken = str(error)
                if isinstance(error, NoAnswer):
                    self.silent_at = time.monotonic()
            self.lines.put((node, broken))
            self.leaving.wait(POLL_S)

    def _follow(self) -> None:
        """Until node 0's end event, or what there is of one."""
        until, looked = self._until(), self.launch.clock()
        self.silent_at = time.monotonic()
        while not self.board.over(NODE_GRACE_S):
            broken = None
            try:
                node, said = self.lines.get(timeout=POLL_S)
                if isinstance(said, LogLine):
                    self.board.take(node, said)
                else:
                    broken = said
            except queue.Empty:
                pass
            now = self.launch.clock()
            if now >= until and not self.board.over(NODE_GRACE_S):
                raise Unheard(
                    f"{self.board.hours:.2f} h are over (launch.max_hours, launch.max_usd); the job was told to "
                    "save a checkpoint before"
                )
            if not self.board.armed and time.monotonic() - self.silent_at > START_S:
                raise ProviderError(
                    f"the machine has not started the job after {START_S / 60:.0f} minutes; does the entry point of "
                    f"{self.launch.composed.job.launch.image} run its arguments, and has it python3?"
                )
            # A log that ends or breaks may mean that the machine has; until all is known about it, look by oneself.
            known = self.alone and self.machine.usd_per_hour > 0
            if (broken is not None or not known) and now - looked >= POLL_S and self.lines.empty():
                looked = now
                self._look(broken)
                until = min(until, self._until())

    def _hear_out(self) -> None:
        """The last lines of the other nodes, which end at about the same time as the first."""
        until = time.monotonic() + HEAR_OUT_S
        while self.board.lead.ended and not all(r.ended for r in self.board.readers) and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                node, said = self.lines.get(timeout=0.1)
                if isinstance(said, LogLine):
                    self.board.take(node, said)

    def _look(self, broken: str | None) -> None:
        try:
            present = self.provider.refresh(self.machine)
            if self.board.armed and not self.alone:
                self._be_alone(self.provider.machines())
                self.alone = True
        except NoAnswer as error:  # which says nothing of the machine: it has its own switch
            if not self.unanswered:
                self.launch.echo(f"{error}; the job goes on there, and is followed again once there is an answer")
            self.unanswered, self.silent_at = True, time.monotonic()
            return
        self.unanswered = False
        if present is None or not present.alive:
            state = "is gone" if present is None else f"is {present.status}"
            log = self.launch.folder / "pod.log"
            raise Unheard(
                f"the {self.machine.kind} {state}, and the end of its job was not heard; its log until then is {log}"
                + (f" ({broken})" if broken else "")
            )
        self.machine = present
        self.board.usd_per_hour = self._rate()
        self._hold_to_limit()

    def _be_alone(self, machines: list[Machine]) -> None:
        """End what a first request made that was carried out late, which would be paid for as well; give way to a
        launch of the same job that was asked for at the same moment, as the two would write each other's files."""
        mine, now = self.machine, datetime.fromtimestamp(self.launch.clock(), UTC)
        folder = self.order.job["run_dir"]
        for other in machines:
            if other.name == mine.name and (twin := besides(other, mine)) is not None:
                self.provider.terminate(twin)
                self.launch.echo(f"terminated {twin.kind} {twin.members or twin.id}: made twice, by one request")
            shares = self.order.volume is not None and run_dir(other) == folder and not orphan(other, now)
            if other.name != mine.name and shares and (other.created, other.id) < (mine.created, mine.id):
                raise ProviderError(
                    f"this very job on this very data runs in the same run directory on {other.kind} {other.name}, "
                    "which was asked for at the same moment, before this one"
                )

    def _hold_to_limit(self) -> None:
        limit, rate = self.launch.composed.job.launch.max_usd_per_hour, self.machine.usd_per_hour
        if limit is not None and rate > limit + 0.005:
            what = f"the {self.machine.kind} is billed at ${rate:.2f}/h"
            raise ProviderError(f"{what}, over max_usd_per_hour={limit:g}")

    def _until(self) -> float:
        """When to end it: the deadline that it carries, or earlier where it is billed at more than was quoted."""
        deadline = self.order.job["deadline"]
        limit = self.launch.composed.job.launch.max_usd
        return deadline if limit is None else min(deadline, self.board.start + limit / self._rate() * 3600)


def end(launch: Launch, provider: Provider, machine: Machine | None, made: list[Volume], looks: int) -> None:
    """Terminate everything of this launch's name; without a machine, take back the volumes made for it (empty).

    By name too: a request that broke half way may have made what this process never heard of. looks: how often, where
    there is no machine, as what was asked for may still be on its way.
    """
    try:
        if machine is not None:
            provider.terminate(machine)
        _end_by_name(launch, provider)
        if machine is None:
            if looks:
                launch.echo(f"looking for {launch.name} for {looks * POLL_S:g} s, which may still be on its way")
            for _ in range(looks):
                launch.sleep(POLL_S)
                _end_by_name(launch, provider)
            for volume in made:
                provider.delete_volume(volume.id)
            _say_what_stays(launch, provider)
    except ProviderError as error:
        launch.echo(
            f"\nATTENTION: it is not certain that {launch.name} has ended ({error}). It ends itself at its "
            "deadline; `loadmaster pods` shows it, `loadmaster pods sweep --all` ends it"
        )
        return
    launch.echo(f"terminated {launch.name}; nothing of it is left running")


def besides(other: Machine, mine: Machine) -> Machine | None:
    """What of a machine of the same name is not `mine`."""
    if mine.kind != "Pods":
        return other if other.id != mine.id else None
    members = tuple(id for id in other.members if id not in mine.members)
    return replace(other, members=members) if members else None


def _say_what_stays(launch: Launch, provider: Provider) -> None:
    """A volume whose making was interrupted is not deleted: it may be another launch's, which has the same name."""
    name = launch.composed.job.launch.volume
    for volume in provider.volumes():
        if name is not None and volume.name == name:
            launch.echo(f"the network volume {name} ({volume.id}, {volume.size_gb} GB) stays, for the next launch")


def _end_by_name(launch: Launch, provider: Provider) -> None:
    for found in provider.machines():
        if found.name == launch.name:
            provider.terminate(found)
