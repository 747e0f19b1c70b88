"""Hydra's own reading and merging of the shipped files, done once a process for each choice of groups.

Most tests compose a job from nothing but conf/ and recipes/, and half of that time went into what is always the same.
What differs (values on the command line, the schema's check, the rules) is done anew for each, and so is everything
where a folder of the test's own is looked into. The product does not know of this; its commands run as they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl

ROOT = Path(__file__).parents[1]
SHIPPED = {f"file://{ROOT / 'conf'}", f"recipes://{ROOT / 'recipes'}", "pkg://hydra.conf", "structured://"}


def only_shipped(repo: Any) -> bool:
    return {f"{source.scheme()}://{source.path}" for source in repo.get_sources()} <= SHIPPED


def kept_lists(make: Callable) -> Callable:
    """Hydra's create_defaults_list(), which depends on the choices of groups alone."""
    kept: dict[Any, Any] = {}

    @wraps(make)
    def create_defaults_list(repo, config_name, overrides_list: list, prepend_hydra: bool, skip_missing: bool) -> Any:
        chosen = [o for o in overrides_list if repo.group_exists(o.key_or_group)]
        odd = any(o.is_sweep_override() for o in overrides_list) or any(isinstance(o.value(), dict) for o in chosen)
        if odd or not only_shipped(repo):
            return make(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        key = (config_name, prepend_hydra, skip_missing, *(o.input_line for o in chosen))
        if key not in kept:
            kept[key] = make(repo, config_name, chosen, prepend_hydra, skip_missing)
        once, values = kept[key], [o for o in overrides_list if o not in chosen]
        return type(once)(list(once.defaults), once.defaults_tree, values, once.overrides)

    return create_defaults_list


def kept_configs(make: Callable) -> Callable:
    """Hydra's merge of the files that a defaults list names; each caller gets a copy to change."""
    kept: dict[Any, bytes] = {}

    @wraps(make)
    def _compose_config_from_defaults_list(self: Any, defaults: list, repo: Any) -> Any:
        if not only_shipped(repo):
            return make(self, defaults=defaults, repo=repo)
        key = tuple((d.config_path, d.parent, d.package, d.is_self, d.primary) for d in defaults)
        if key not in kept:
            kept[key] = pickle.dumps(make(self, defaults=defaults, repo=repo))
        return pickle.loads(kept[key])

    return _compose_config_from_defaults_list


@contextmanager
def kept_compositions() -> Iterator[None]:
    lists, configs = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    config_loader_impl.create_defaults_list = kept_lists(lists)
    ConfigLoaderImpl._compose_config_from_defaults_list = kept_configs(configs)
    try:
        yield
    finally:
        config_loader_impl.create_defaults_list = lists
        ConfigLoaderImpl._compose_config_from_defaults_list = configs
