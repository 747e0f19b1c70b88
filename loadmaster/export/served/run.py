"""One server after another for the formats of a run, each asked and stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected, NotChecked
from loadmaster.export.served.client import Client
from loadmaster.export.served.gpus import Division, division
from loadmaster.export.served.harness import LONGEST, Asked, Figures
from loadmaster.export.served.server import free_port, server_command, start_timeout_s, started
from loadmaster.files import read_json
from loadmaster.models.language_model import multimodal_of
from loadmaster.preflight.config_json import from_config, known_positions, short_positions
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.serving import weight_bytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Servers:
    """What the servers of a run share."""

    run_dir: Path
    served_as: str
    base: Path
    sequence_length: int
    python: Path | None
    """Interpreter that has vLLM."""
    machine: Hardware
    """What the servers run on."""
    tasks: Asked | None = None

    @property
    def max_model_len(self) -> int:
        """Tokens of a request: those of training; with tasks up to LONGEST; never more than the model has."""
        config = read_json(self.base / "config.json")
        own, longest = known_positions(config) or self.sequence_length, self.sequence_length
        if self.tasks is not None:
            longest = max(longest, min(LONGEST, short_positions(config) or LONGEST))
        return min(own, longest)

    def figures(
        self, name: str, manifest: dict[str, Any], ask: Callable[[Client], dict[str, Any]], say: Say
    ) -> dict[str, Any]:
        """What `ask` finds in the exported format, how long its server took, and its tasks where there are any.

        Raises ExportRejected when the server dies or cannot be asked, NotChecked when it is not waited for any longer.
        """
        folder = self.run_dir / "export" / name
        return self._served(name, folder, manifest, ask, say)

    def tasks_of_base(self, echo: Say) -> Figures:
        """The tasks before training. Raises ExportRejected, or NotChecked where the base's server is not waited for."""
        try:
            found = self._served("base", self.base, {"format": "bf16"}, None, lambda text: echo(f"base: {text}"))
        except NotChecked:
            raise
        except ExportRejected as error:
            raise ExportRejected(f"the tasks cannot be asked of the base: {error}") from None
        return found["tasks"]

    def _served(
        self, name: str, folder: Path, manifest: dict[str, Any], ask: Callable[[Client], dict[str, Any]] | None,
        say: Say,
    ) -> dict[str, Any]:
        assert self.python is not None
        port = free_port()
        divided = self._division(folder, manifest)
        if divided.gpus is not None and divided.gpus > 1:
            say(f"over {divided.gpus} GPUs")
        base = multimodal_of(self.base) or self.base  # which an adapter is published for
        command = server_command(
            self.python, folder.absolute(), base.absolute(), manifest, self.served_as, port, self.max_model_len,
            divided,
        )
        ready_within_s = start_timeout_s(file_bytes(folder) + file_bytes(self.base))
        with started(command, port, self.run_dir / "serve-check" / f"{name}.log") as server:
            ready = server.wait_until_ready(ready_within_s, say)
            say(f"ready after {ready:.0f} s, asking")
            figures: dict[str, Any] = {"seconds_to_ready": ready}
            try:
                if ask is not None:
                    with Client(port, self.served_as) as client:
                        figures |= ask(client)
                if self.tasks is not None:
                    say(f"asking {', '.join(self.tasks.harness.tasks)}")
                    figures["tasks"] = self.tasks.of(port, self.served_as, folder.absolute(), self.max_model_len)
            except ExportRejected as error:
                if isinstance(error, NotChecked) or not server.has_ended(within_s=5):
                    raise
                raise server.death(f"{error}; ") from None
        return figures

    def _division(self, folder: Path, manifest: dict[str, Any]) -> Division:
        """Where this folder is served: by the base's sizes, which training does not change, and its own weights."""
        shape = from_config(read_json(self.base / "config.json"), self.served_as)
        own, form = folder / "config.json", manifest["format"]
        config = read_json(own) if own.is_file() else {}
        weights = float(file_bytes(folder))
        if form == "adapter":
            weights, form = weights + weight_bytes(shape, "bf16"), "bf16"
        return division(shape, config, form, weights, self.max_model_len, self.machine)


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
