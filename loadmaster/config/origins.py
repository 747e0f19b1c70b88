"""Where each value was set: dotted key -> `recipes/lora_8b.yaml:21`, `command line` or `default`.

Hydra knows the files and their order but forgets the lines; YAML's own parser knows the lines. So every
file of the defaults list is parsed once more for its line marks alone, in Hydra's order: later wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault

from loadmaster.config.fields import fields
from loadmaster.config.hydra_sources import RecipeSource
from loadmaster.config.shipped import display_path

COMMAND_LINE = "command line"
DEFAULT = "default"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def origin_of(origins: dict[str, str], key: str) -> str:
    """Origin of `key`; of what is inside it, where only that was set; of what it is inside of, for no field."""
    if key in origins:
        return origins[key]
    inside = [origin for name, origin in origins.items() if name.startswith(f"{key}.")]
    if inside:
        return inside[-1]
    while key and key not in fields():
        key = key.rpartition(".")[0]
        if key in origins:
            return origins[key]
    return DEFAULT


def file_of(loader: ConfigLoaderImpl, config_path: str) -> Path | None:
    """The file behind a Hydra config path (`model/llama3_1_8b`), as the first source that has it says."""
    for source in loader.get_sources():
        if source.is_config(config_path):
            if isinstance(source, RecipeSource):
                return Path(source.path) / f"{config_path.partition('/')[2].removesuffix('.yaml')}.yaml"
            if source.scheme() == "file":  # not isinstance: Hydra's plugin scan makes the class a second time
                return Path(source.path) / f"{config_path.removesuffix('.yaml')}.yaml"
            return None
    return None


def origins_of_files(loader: ConfigLoaderImpl, defaults: list[ResultDefault]) -> dict[str, str]:
    """Origin of every key that a file of the defaults list sets; Hydra's own configuration is left out."""
    origins: dict[str, str] = {}
    for default in defaults:
        path = default.config_path
        if path is None or path.startswith("hydra/"):
            continue
        file = file_of(loader, path)
        if file is None:
            continue
        shown, prefix = display_path(file), f"{default.package}." if default.package else ""
        for key, line in lines_of(file):
            if key.partition(".")[0] not in ("defaults", "hydra"):
                origins[prefix + key] = f"{shown}:{line}"
    return origins


def lines_of(file: Path) -> Iterator[tuple[str, int]]:
    """Every dotted key of a YAML file with its line, the first line being 1."""
    return _lines(yaml.compose(file.read_text(encoding="utf-8"), Loader=_LOADER))


def line_of_default(file: Path, option: str) -> int | None:
    """Line of a file's defaults list that asks for `option` of some group."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_LOADER)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for item in value.value:
                asked = [v for _, v in item.value] if isinstance(item, yaml.MappingNode) else [item]
                each = (n for node in asked for n in (node.value if isinstance(node, yaml.SequenceNode) else [node]))
                if option in (name.value.rpartition("/")[2] for name in each):  # - /GROUP/OPTION
                    return item.start_mark.line + 1
    return None


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:  # a section is set where its fields are
            yield from _lines(value, f"{name}.")
        else:
            yield name, key.start_mark.line + 1


def origin_file(origin: str) -> str:
    """The file of an origin, without its line."""
    return origin if origin in (COMMAND_LINE, DEFAULT) else origin.rpartition(":")[0]
