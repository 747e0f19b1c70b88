"""`loadmaster pods`: what this tool has made and what it costs; `loadmaster pods sweep`: end what nobody needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadmaster import catalog
from loadmaster.errors import LoadmasterError, ProviderError
from loadmaster.launch.provider import Machine, Provider
from loadmaster.streams import agreed
from loadmaster.tables import print_table

GRACE_HOURS = 0.25
"""A machine this long past its deadline did not end itself."""
PLACED_HOURS = 1.0
"""A cluster that has no machines after this will not get any."""


def age_hours(machine: Machine, now: datetime) -> float:
    return max(0.0, (now - machine.created).total_seconds() / 3600)


def usd_so_far(machine: Machine, now: datetime) -> float:
    """Age times the present rate: what it has cost if it ran all the time; disk is not in it."""
    return age_hours(machine, now) * machine.usd_per_hour


def deadline(machine: Machine) -> datetime | None:
    try:
        return datetime.fromtimestamp(json.loads(machine.env["LOADMASTER_JOB"])["deadline"], UTC)
    except (KeyError, ValueError, TypeError):
        return None


def run_dir(machine: Machine) -> str | None:
    """Where its job writes, as it sees it."""
    try:
        return json.loads(machine.env["LOADMASTER_JOB"])["run_dir"]
    except (KeyError, ValueError, TypeError):
        return None


def orphan(machine: Machine, now: datetime) -> str | None:
    """Why nobody needs this machine any more; None when its job may still run."""
    if not machine.alive:
        lost = "nothing runs, its disk goes on costing" if machine.nodes == 1 else "a node of it has ended"
        return f"{machine.status}: {lost}"
    if machine.nodes > 1 and not machine.members:
        return "got no machines" if age_hours(machine, now) > PLACED_HOURS else None
    end = deadline(machine)
    if end is None:
        return "carries no job of this tool"
    if (now - end).total_seconds() / 3600 > GRACE_HOURS:
        return "past its deadline"
    return None


def list_pods(console: Console, provider: Provider | None = None) -> int:
    """Print every Pod and cluster that this tool has made, with age, cost so far and deadline; and all volumes."""
    provider, now = provider or provider_of(), datetime.now(UTC)
    machines = provider.machines()
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "id", "status", "GPUs", "age h", "$/h", "$ so far", "ends", "orphan"):
        table.add_column(heading, justify="right" if heading in ("age h", "$/h", "$ so far") else "left")
    for machine in machines:
        end = deadline(machine)
        table.add_row(
            escape(machine.name), machine.kind, machine.id, machine.status, machine.label,
            f"{age_hours(machine, now):.2f}", f"{machine.usd_per_hour:.2f}", f"{usd_so_far(machine, now):.2f}",
            "" if end is None else f"{end:%Y-%m-%d %H:%M} UTC", orphan(machine, now) or "",
        )
    if machines:
        print_table(table, console)
    else:
        console.print("no Pods or clusters of loadmaster")
    price = catalog.prices()["storage"]["network_volume_usd_per_gb_month"]
    for volume in provider.volumes():  # all of them: launch.volume may have given any name
        month = volume.size_gb * price
        console.print(
            f"volume {volume.name} ({volume.id}): {volume.size_gb} GB in {volume.place}, ${month:.2f} a month",
            highlight=False, markup=False,
        )
    return 0


def sweep_pods(
    console: Console, yes: bool = False, everything: bool = False, names: Sequence[str] = (),
    provider: Provider | None = None,
) -> int:
    """End orphans, or everything that this tool has made, or what is named; asks first. Volumes are never touched.

    Raises LoadmasterError for a name that is none, ProviderError when one could not be ended.
    """
    provider, now = provider or provider_of(), datetime.now(UTC)
    machines = provider.machines()
    if unknown := [name for name in names if not any(name in (m.name, m.id) for m in machines)]:
        there = ", ".join(m.name for m in machines) or "nothing"
        raise LoadmasterError(f"there is no {', '.join(unknown)} that loadmaster has made; there is: {there}")
    doomed = [(m, orphan(m, now)) for m in machines if not names or m.name in names or m.id in names]
    doomed = [(machine, why) for machine, why in doomed if why or everything or names]
    if not doomed:
        console.print("nothing to sweep")
        return 0
    for machine, why in doomed:
        said = f"{machine.kind} {machine.name} ({machine.id}): {why or 'its job may still run'}"
        console.print(said, highlight=False, markup=False)
    if not yes and not agreed(f"Terminate {len(doomed)}?"):
        raise LoadmasterError("nothing was terminated")
    left: list[str] = []
    for machine, _ in doomed:
        try:
            provider.terminate(machine)
        except ProviderError as error:  # the others cost money as well
            left.append(f"{machine.name} ({error})")
        else:
            console.print(f"terminated {machine.name}", highlight=False, markup=False)
    if left:
        raise ProviderError(f"not certain to have ended, and may cost money: {'; '.join(left)}. Sweep again")
    return 0


def provider_of(name: str = "runpod") -> Provider:
    """The one place where a provider is picked; a second one joins here and in the choices of launch.name."""
    from loadmaster.launch.runpod.provider import Runpod

    return {"runpod": Runpod}[name]()


def listed_provider_of(name: str) -> Provider | None:
    """Of that name without an account, for a dry run; None where the environment has a key to ask with."""
    from loadmaster.launch.runpod.http import has_key
    from loadmaster.launch.runpod.listed import Listed

    return None if has_key() else {"runpod": Listed}[name]()
