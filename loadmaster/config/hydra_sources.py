"""Where Hydra looks: the shipped conf/ and recipes/, and the same two folders where the user stands.

The group is called `recipe` (one picks a recipe) and its folder `recipes/` (it holds many), which a plain
file source cannot express; `RecipeSource` maps the one to the other. Folders of the current directory come
first, so that an installed loadmaster finds a user's own recipes, and a user's file wins over a shipped one.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.conf import HydraConf, RunDir, SweepDir
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, SearchPathException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from yaml.reader import ReaderError

from loadmaster.config.schema import Job
from loadmaster.config.shipped import shipped_folder

PRIMARY = "train"
VERSION_BASE = "1.3"
GROUP = "recipe"
DEFAULTS = "schema_defaults"
SWEEP_DIR = "runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}"


class NoSettings(HydraException):
    """A file that Hydra composes holds no YAML, or YAML without fields."""

    def __init__(self, config_path: str, why: str):
        super().__init__(f"{config_path}: {why}")
        self.config_path, self.why = config_path, why


class FileSource(FileConfigSource):
    """A folder of groups, the recipes of --config-dir among them. Takes the place of Hydra's own."""

    def load_config(self, config_path: str) -> ConfigResult:
        try:
            loaded = super().load_config(self._inside(config_path) or "")
        except (OSError, UnicodeDecodeError, ReaderError) as error:  # which name no file, or would be a traceback
            of_a_number = isinstance(error, OSError) and error.errno is None  # OmegaConf's
            why = "it holds no fields" if of_a_number else " ".join(str(error).split())
            raise NoSettings(config_path, why) from error
        if not isinstance(loaded.config, DictConfig):
            raise NoSettings(config_path, "it holds no fields")
        if config_path.startswith(f"{GROUP}/"):
            # An overlay whatever its header says: under a package of its own it would set nothing, and silently.
            loaded.header["package"] = loaded.header["package"] or "_global_"
        return loaded

    @staticmethod
    def _inside(config_path: str) -> str | None:
        """Where in this folder it lies; None for what is not of its groups."""
        return config_path


class RecipeSource(FileSource):
    """A folder of recipes, seen by Hydra as the group `recipe`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def is_group(self, config_path: str) -> bool:
        inside = self._inside(config_path)
        return config_path == "" or (inside is not None and super().is_group(inside))

    def is_config(self, config_path: str) -> bool:
        inside = self._inside(config_path)
        return inside is not None and inside != "" and super().is_config(inside)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        names: list[str] = []
        for file in sorted((Path(self.path) / (self._inside(config_path) or "")).iterdir()):
            self._list_add_result(names, f"{config_path}/{file.name}", file.name, results_filter)
        return sorted(set(names))

    @staticmethod
    def _inside(config_path: str) -> str | None:
        """`recipe/team/mine` -> `team/mine`; None for what is not a recipe."""
        if config_path == GROUP:
            return ""
        return config_path.removeprefix(f"{GROUP}/") if config_path.startswith(f"{GROUP}/") else None


class LoadmasterSearchPath(SearchPathPlugin):
    """Puts the current folder's conf/ and recipes/ before Hydra's main folder, and the shipped recipes after it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        main = SearchPathQuery(provider="main")
        recipes, scheme = shipped_folder("recipes"), RecipeSource.scheme()
        for here, shipped, form in ((Path("conf"), shipped_folder("conf"), "file"), (Path("recipes"), recipes, scheme)):
            if here.is_dir() and here.resolve() != shipped.resolve():
                search_path.prepend("current folder", f"{form}://{here.resolve()}", anchor=main)
        search_path.append("loadmaster", f"{scheme}://{recipes}", anchor=main)


def main_folder() -> str:
    """What @hydra.main and our own loader both take as the config path."""
    return str(shipped_folder("conf"))


def register() -> None:
    """Make Hydra know our sources and the schema's defaults; safe to call again."""
    version.setbase(VERSION_BASE)
    plugins = Plugins.instance()
    SourcesRegistry.instance().types[FileSource.scheme()] = FileSource  # of two of a scheme register() keeps the first
    plugins.register(RecipeSource)
    plugins.register(LoadmasterSearchPath)
    # First in the defaults list, so that `--cfg job` shows every field and not only those that a file sets.
    # (But not `recipe`: that is the group's choice, which composition fills in.)
    if f"{DEFAULTS}.yaml" not in ConfigStore.instance().repo:
        defaults = dataclasses.asdict(Job())
        del defaults["recipe"]
        ConfigStore.instance().store(name=DEFAULTS, node=defaults, provider="loadmaster")
        ConfigStore.instance().store(name="config", node=_of_hydra(), group="hydra", provider="loadmaster")
    setup_globals()


def _of_hydra() -> HydraConf:
    """Hydra's own settings as conf/train.yaml has them, for another primary file that says nothing of them: else Hydra
    would make a folder outputs/, and say each line once more."""
    of_hydra = HydraConf(run=RunDir("."), output_subdir=None, sweep=SweepDir(SWEEP_DIR, "."))
    logging = ("job_logging", "hydra_logging")
    of_hydra.defaults = [{name: "none" if name in logging else c[name] for name in c} for c in of_hydra.defaults]
    return of_hydra


class Repository(ConfigRepository):
    """Hydra's own, which Hydra copies for each composition, lest hydra.searchpath change what the next one looks into.
    Its list of sources is copied, and not the sources with every structured configuration that they know of: that was
    a tenth of a composition's time."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Repository:
        copied = copy.copy(self)
        copied.sources = list(self.sources)
        return copied


class Loader(ConfigLoaderImpl):
    """Hydra's own, which keeps the defaults list that it worked out last: it is a third of a composition's time."""

    composed_of: list[ResultDefault]

    def __init__(self, config_search_path: ConfigSearchPath):
        super().__init__(config_search_path)
        self.repository = Repository(config_search_path)

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> Any:
        self.composed_of = defaults
        return super()._compose_config_from_defaults_list(defaults=defaults, repo=repo)


def config_loader(config_dir: str | None = None) -> Loader:
    """Hydra's own loader over our search path; `config_dir` is its --config-dir.

    hydra.compose() would do but for two things: it cannot run inside @hydra.main on other overrides, and it
    hides the defaults list that the origins are read from. Hydra is held below 1.4 for this.
    """
    register()
    search_path = create_config_search_path(main_folder())
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise SearchPathException(f"Additional config directory '{folder}' not found")
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return Loader(search_path)
