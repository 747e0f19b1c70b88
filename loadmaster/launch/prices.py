"""`loadmaster prices`: what GPUs cost in plans, and since when; --refresh asks the provider and writes a price file."""

from __future__ import annotations

from datetime import UTC, datetime

import yaml
from rich.console import Console
from rich.table import Table

from loadmaster import catalog
from loadmaster.errors import ProviderError
from loadmaster.files import write_text
from loadmaster.launch.runpod import RunpodClient
from loadmaster.tables import print_table


def show_prices(console: Console) -> int:
    """The prices that plans use, one GPU a row."""
    prices = catalog.prices()
    table = Table(box=None, pad_edge=False)
    for heading in ("GPU", "$/h", "community $/h", "serverless $/h", "date", "source"):
        table.add_column(heading, justify="right" if "$" in heading else "left", no_wrap=heading != "source")
    for name, listed in prices["gpus"].items():
        figures = (listed.get(f"{kind}usd_per_hour") for kind in ("pod_", "community_", "serverless_"))
        source = prices["sources"].get(listed["date"], "")
        table.add_row(name, *("" if f is None else f"{f:.2f}" for f in figures), str(listed["date"]), source)
    print_table(table, console)
    own = catalog.price_file()
    where = f"from {own}" if own.is_file() else "as shipped; `loadmaster prices --refresh` asks for today's"
    console.print(f"{prices['provider']} list prices of one GPU, {where}", highlight=False, soft_wrap=True)
    return 0


def refresh_prices(console: Console, client: RunpodClient | None = None) -> int:
    """Read the provider's catalogue and write the price file that plans then use.

    Raises ProviderError without RUNPOD_API_KEY, or when the provider lists none of the catalogue's GPUs.
    """
    with client or RunpodClient() as asked:
        listed = {kind.id: kind for kind in asked.gpus()}
        source = f"{asked.api.base_url}/catalog/gpus"
    today = datetime.now(UTC).date()
    gpus = {}
    for name, facts in catalog.gpus().items():
        kind = listed.get(facts["name"])
        pod = 0 if kind is None else kind.price.secure if kind.secure else kind.price.community
        if pod:
            figures = {"pod": pod, "community": kind.price.community, "serverless": kind.price.serverless}
            gpus[name] = {"date": today, "hosts": "secure" if kind.secure else "community"}
            gpus[name] |= {f"{key}_usd_per_hour": value for key, value in figures.items() if value}
    if not gpus:
        raise ProviderError(f"{source} lists no price of a GPU of the catalogue; the prices stay as they were")
    rented = {machine["gpu"] for machine in catalog.machines()}
    serverless = all("serverless_usd_per_hour" in prices for name, prices in gpus.items() if name in rented)
    path = catalog.price_file()
    write_text(path, yaml.safe_dump({"date": today, "source": source, "serverless": serverless, "gpus": gpus}))
    missing = [name for name in catalog.prices()["gpus"] if name not in gpus]  # of those that have one
    kept = f"; not listed, price as before: {', '.join(missing)}" if missing else ""
    console.print(f"{path}: {len(gpus)} prices of {today}{kept}", highlight=False, soft_wrap=True)
    return show_prices(console)
