"""A rank that is stuck, stopped or lost ends the job in bounded time, with names and stacks, never in silence.

Each rank has a thread that publishes what the rank does through the store that the processes met at, and reads
what the others publish; loadmaster/training/liveness.py judges. When something is wrong, every rank writes the
stacks of its threads to `logs/rank-N.stack`, one rank of each host prints the sentence, and the processes end
with exit code 4: a collective that waits for a lost rank cannot be interrupted otherwise. A rank that fails by
itself says so before it goes, so that the others name the cause and not its echo in their collectives.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from loadmaster.errors import LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.training.liveness import (
    WRITER,
    Beat,
    Sighting,
    age,
    judge,
    limit_s,
    lost,
    printer,
    see,
    slow_beats,
    straggler_message,
)
from loadmaster.training.world import JOIN_S, TIMEOUT_S, World, wait_at_most

PACKAGE = Path(__file__).resolve().parents[1]
EXIT_CODE = TrainingFailed.exit_code
SILENCE_S = 60.0
"""A rank that publishes nothing for so long is gone; longer than any call that keeps Python from switching threads."""
LAST_STEPS = 20
COMMUNICATION = ("gloo", "nccl", "process group", "processgroup", "connection closed", "timed out", "socket")


class Watchdog:
    """`with Watchdog(world, logs) as watch:` around everything that communicates; `watch.at(step, phase)` within.

    In a world of one it does nothing. All ranks make their watchdogs in the same order.
    hang_s: seconds without progress within a step that count as stuck; None: from the steps seen
    (liveness.limit_s). Raises TrainingFailed in place of an error of communication, naming who was lost.
    logs: where stacks go; None: nowhere. of: the ranks whose end is this one's; None: all. While `resting` is set this
    rank goes on publishing, and judges nobody.
    on_end: told the sentence, on one rank of each host, before the watching thread ends the process; None: to stderr.
    """

    _made = 0

    def __init__(
        self,
        world: World,
        logs: Path | None,
        hang_s: float | None = None,
        silence_s: float | None = None,
        on_end: Callable[[str], None] | None = None,
        of: Sequence[int] | None = None,
    ):
        self.world, self.logs, self.hang_s, self.resting = world, logs, hang_s, False
        self.watched = range(world.size) if of is None else of
        self.silence_s = silence_s or min(SILENCE_S, hang_s or SILENCE_S)
        self.interval_s = min(2.0 + world.size / 64, self.silence_s / 5)
        self.answer_s = min(self.silence_s, 10.0)
        self.on_end = on_end or _print_error
        Watchdog._made += 1
        self._keys = [f"loadmaster/watch/{Watchdog._made}/{rank}" for rank in range(world.size)]
        self._beat = Beat(world.rank, world.node, os.environ.get("NODE_ADDR") or socket.gethostname())
        self._sightings: dict[int, Sighting] = {}
        self._expected_s = 0.0
        self._steps: deque[float] = deque(maxlen=LAST_STEPS)
        self._busy: deque[float] = deque(maxlen=LAST_STEPS)
        self._step_began = time.monotonic()
        self._slow: list[int] = []
        self._lock, self._stop, self._leaving = threading.Lock(), threading.Event(), False
        self._main = threading.get_ident()

    # ------------------------------------------------------- what the loop calls

    def at(self, step: int, phase: str) -> None:
        """Progress: the rank has come to `phase` of `step`. Phases named "step" have the steps' short limit."""
        with self._lock:
            now, beat = time.monotonic(), self._beat
            if step != beat.step:
                if beat.step and beat.phase != "start":
                    self._steps.append(now - self._step_began)
                self._step_began = now
            mark = beat.mark + 1 if step == beat.step else 0
            self._beat = replace(beat, step=step, phase=phase, mark=mark)

    def expect(self, seconds: float) -> None:
        """What a step takes by the rehearsal: for the first, as nobody has seen one of this run yet."""
        self._expected_s = seconds

    @property
    def slowest_s(self) -> float:
        """Seconds of the slowest of the last steps, by which the limit for the next one goes."""
        return max(self._steps, default=self._expected_s)

    def worked(self, seconds: float) -> None:
        """This rank's own part of a step, without what it waited for others: what a straggler is told by."""
        with self._lock:
            self._busy.append(seconds)

    def straggler(self) -> str | None:
        """A sentence that names the slow ranks, once for as long as it is the same ones; None where none is slow."""
        sightings = list(self._sightings.values())
        slow = [beat.rank for beat in slow_beats(sightings)]
        if not slow or slow == self._slow:
            return None
        self._slow = slow
        return straggler_message(sightings)

    # ------------------------------------------------------------ begin and end

    def __enter__(self) -> Watchdog:
        if self.world.size == 1:
            return self
        self._stack_path = Path(os.devnull)
        if self.logs is not None:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._stack_path = self.logs / f"rank-{self.world.rank}.stack"
        self._stack_file = open(self._stack_path, "w", encoding="utf-8")
        store = _connect(self.answer_s)
        store.set(self._keys[self.world.rank], self._publish().encode())
        beats = self.world.gather(self._beat)  # from here on every key is there
        self._sightings = {beat.rank: Sighting(beat) for beat in beats}
        self._heard = time.monotonic()
        work = ((self._exchange, (store,)), (self._watch, ()))
        self._threads = [threading.Thread(target=target, args=args, daemon=True) for target, args in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.world.size == 1:
            return
        self._leaving = True  # from here on this thread ends the run, not the watching one
        explained = None
        if error is None or isinstance(error, StoppedOnRequest):
            self._say(state="done")
        elif is_communication(error):
            explained = self._explain(error)
            self._say(state="ended", reason=explained)
        else:
            text = str(error) if isinstance(error, LoadmasterError) else f"{type(error).__name__}: {error}"
            self._say(state="ended", reason=f"rank {self.world.rank} on {self._place()} failed: {text}")
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(self.silence_s + self.answer_s)  # one inside the store when Python ends would abort it
        if any(thread.is_alive() for thread in self._threads):  # who keeps the store is stopped, and never answers
            self._end(self._store_lost(0.0))
        self._stack_file.close()
        if self.logs is not None and not self._stack_path.stat().st_size:
            self._stack_path.unlink()
        if explained is None and error is not None and not isinstance(error, StoppedOnRequest):
            time.sleep(2 * self.interval_s)  # let the others hear of it before their siblings are ended
        if explained is not None:
            if not self._speaks():
                time.sleep(4 * self.interval_s)  # the first that ends has its siblings ended, who may still write
            elif not self.world.lead:  # the lead's error is shown by whoever called it
                self.on_end(explained)
            failure = TrainingFailed(explained)
            failure.said = not self.world.lead
            raise failure from None

    # ------------------------------------------------------------- the threads

    def _exchange(self, store: dist.TCPStore | None) -> None:
        """Publish and read; a store that does not answer is asked anew, over a new connection."""
        while True:
            ending = self._stop.is_set()
            try:
                store = store or _connect(self.answer_s)
                store.set(self._keys[self.world.rank], self._publish().encode())
                if ending:
                    return
                beats = [Beat.decode(data) for data in store.multi_get(self._keys)]
                now = time.monotonic()
                with self._lock:
                    passed, self._heard = now - self._heard, now
                    self._sightings = {beat.rank: see(self._sightings[beat.rank], beat, passed) for beat in beats}
            except (OSError, RuntimeError, ValueError):
                store = None
                if ending:
                    return
            self._stop.wait(self.interval_s)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            if self.resting:
                continue
            slowest = self.slowest_s
            # Should a call keep every Python thread from running, this ends the process all the same.
            backstop_s = limit_s(self._beat.phase, self.hang_s, slowest) + 2 * self.silence_s
            if math.isfinite(backstop_s):
                faulthandler.dump_traceback_later(backstop_s, exit=True, file=self._stack_file)
            else:
                faulthandler.cancel_dump_traceback_later()
            seen = [self._sightings[rank] for rank in self.watched]
            message = self._store_lost(self.silence_s) or judge(seen, self.silence_s, self.hang_s, slowest)
            if message is not None and not self._leaving:
                self._end(message)

    def _store_lost(self, silence_s: float) -> str | None:
        """Who is gone when the store has not answered for `silence_s`: whoever keeps it."""
        quiet = time.monotonic() - self._heard
        if quiet <= silence_s:
            return None
        keepers = [age(s, quiet) for s in self._store_keepers()]
        if not keepers:
            said = f"torchrun on this host, {self._place()}, has not answered for {quiet:.0f} s"
            return f"{said}: it was ended, or stopped, or all of this was suspended"
        return lost(keepers, list(self._sightings.values()))

    def _store_keepers(self) -> list[Sighting]:
        """The ranks that are gone when the store is: node 0's under torchrun, whose agent keeps it, else rank 0."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return [self._sightings[0]]
        return [s for s in self._sightings.values() if s.beat.node == 0 and self.world.node != 0]

    def _end(self, message: str) -> None:
        """Write stacks, tell the others, print on one rank of the host, and end the process."""
        self._say(state="ended", reason=message)
        self._dump(message)
        speaks = self._speaks()
        if speaks:
            self.on_end(message if self.logs is None else f"{message}\nstacks of the ranks: {self.logs}/rank-*.stack")
        # The first process that ends has its siblings ended: give them time to write theirs.
        time.sleep((2 if speaks else 4) * self.interval_s)
        os._exit(EXIT_CODE)

    def _speaks(self) -> bool:
        """Whether this rank tells its host's log: the lowest there that is not gone."""
        quiet_s = 2.5 * self.interval_s
        gone = [s for s in self._sightings.values() if s.quiet_s > quiet_s]
        gone += self._store_keepers() if time.monotonic() - self._heard > quiet_s else []
        missing = {s.beat.rank for s in gone} - {self.world.rank}
        beats = [s.beat for s in self._sightings.values()]
        return printer(beats, self.world.node, missing) == self.world.rank

    def _dump(self, message: str) -> None:
        beat = self._publish()
        self._stack_file.write(
            f"rank {beat.rank} of {self.world.size} on {self._place()}, process {os.getpid()}, at step {beat.step} in "
            f"{beat.phase}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{message}\n\n"
        )
        self._stack_file.flush()
        faulthandler.dump_traceback(file=self._stack_file, all_threads=True)
        self._stack_file.flush()

    # ----------------------------------------------------------------- helpers

    def _explain(self, error: BaseException) -> str:
        """Who is gone, or failed first, when a collective has failed; waits for it to show in the beats."""
        self._dump(f"{type(error).__name__}: {error}")
        quiet_s = 3.5 * self.interval_s
        deadline = time.monotonic() + 3 * quiet_s
        while time.monotonic() < deadline:
            time.sleep(self.interval_s / 2)
            everyone = list(self._sightings.values())
            others = [s for s in everyone if s.beat.rank != self.world.rank]
            ended = [s.beat.reason for s in others if s.beat.state == "ended"]
            silent = [s for s in others if s.beat.state == "running" and s.quiet_s > quiet_s]
            message = next(iter(ended), None) or self._store_lost(quiet_s) or (silent and lost(silent, everyone))
            if message:
                return message
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"communication failed at step {self._beat.step} on {self._place()}, and every rank is alive: "
            f"{first_line}. Look at the network between the hosts"
        )

    def _say(self, **values: object) -> None:
        with self._lock:
            self._beat = replace(self._beat, **values)

    def _publish(self) -> Beat:
        where, stack = self._where()
        with self._lock:
            busy = sum(self._busy) / len(self._busy) if self._busy else 0.0
            self._beat = replace(self._beat, count=self._beat.count + 1, where=where, stack=stack, busy_s=busy)
            return self._beat

    def _where(self) -> tuple[str, int]:
        """(the line that the main thread is at, a checksum of its stack and of those that write checkpoints).

        A frame holds what its function holds, tensors too, and outlives it while somebody has it. Beside the others the
        frame of this very function would be in a cycle, and all of them kept until cycles are collected: a step's
        buffers beside those of the next.
        """
        frames = sys._current_frames()
        frames[threading.get_ident()] = sys._getframe(1)
        main = frames.get(self._main)
        writers = [frames.get(thread.ident) for thread in threading.enumerate() if thread.name == WRITER]
        return own_line(main), checksum(main, *writers)

    def _place(self) -> str:
        return f"node {self.world.node} ({self._beat.host})"


def is_communication(error: BaseException) -> bool:
    """Whether an error says that others could not be reached, and not that this rank went wrong."""
    if isinstance(error, LoadmasterError):
        return False
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in COMMUNICATION)


@contextmanager
def as_they_begin(rank: int) -> Iterator[None]:
    """Around what ranks say to one another before a Watchdog is there to name who is gone, or stopped."""
    wait_at_most(JOIN_S)
    try:
        yield
        wait_at_most(TIMEOUT_S)
    except (RuntimeError, ConnectionError) as error:
        if not is_communication(error):
            raise
        raise LoadmasterError(f"rank {rank} lost the others as they began: {str(error).splitlines()[0]}") from None


def own_line(frame: FrameType | None) -> str:
    """The innermost line of this program in a stack: `loop.py:120 in backward`."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def checksum(*stacks: FrameType | None) -> int:
    """Of the lines of some threads' stacks: it changes when one of them moves, and not while they wait."""
    value = 0
    for frame in stacks:
        while frame is not None:
            value = zlib.crc32(f"{frame.f_code.co_filename}:{frame.f_lineno}".encode(), value)
            frame = frame.f_back
    return value


def _connect(timeout_s: float) -> dist.TCPStore:
    """An own connection to the store that the processes met at; OSError or RuntimeError where it does not answer."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((host, port), timeout_s).close()  # TCPStore would repeat in vain, and loudly
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
