"""Hydra config sources: folders and packages whose values files hold several blocks.

conf/values/<world>/<method>.yaml holds a method's values in a world: `all`, then by kind of concept, then by task.
Hydra's defaults lists name configurations, so each block is one: values/all/mini/uce is the block `all` of
values/mini/uce.yaml, values/kind/mini/uce/orr is the block for the kind of concept that the task orr erases, and
values/task/mini/uce/orr is the block for the task itself.

The configuration of a method or attack is read with the defaults of its dataclass, so YAML need not repeat them.
"""

from __future__ import annotations

import re

from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from .defaults import complete

KINDS = {  # task -> kind of the concepts that it erases; `caption` erases any
    "object": "object",
    "imagenette": "object",
    "orr": "object",
    "celebrity": "person",
    "style": "style",
    "explicit": "explicit",
}
COMPLETED = ("method", "attack")  # groups whose configurations are read with the defaults of their dataclasses
VALUES = re.compile(r"values/(all|kind|task)/([^/]+/[^/]+)(?:/([^/]+))?")


def block_name(scope: str, task: str | None) -> str | None:
    """Return the name of a values file's block.

    It is the block for all tasks, for the kind of a task, or for the task.
    """
    if scope == "all" or task is None:
        return "all" if task is None else None
    if scope == "kind":
        return KINDS.get(task)
    return f"{task}_task" if task in KINDS.values() else task


class Blocks:
    """A config source that reads values by block and completes plugins' defaults."""

    def address(self, config_path: str) -> tuple[str, str] | None:
        """Return (file, block) if a configuration is a block, else None."""
        match = VALUES.fullmatch(config_path)
        block = block_name(match[1], match[3]) if match else None
        return (f"values/{match[2]}", block) if match and block else None

    def is_config(self, config_path: str) -> bool:
        if (address := self.address(config_path)) is None:
            return super().is_config(config_path)
        file, block = address
        return super().is_config(file) and block in super().load_config(file).config

    def load_config(self, config_path: str) -> ConfigResult:
        if (address := self.address(config_path)) is None:
            result = super().load_config(config_path)
            if config_path.partition("/")[0] in COMPLETED and isinstance(result.config, DictConfig):
                result.config = OmegaConf.create(complete(OmegaConf.to_container(result.config)))
            return result
        file, block = address
        result = super().load_config(file)
        values = OmegaConf.to_container(result.config)[block] if isinstance(result.config, DictConfig) else None
        result.config = OmegaConf.create(values or {})
        result.header["package"] = "method"
        return result


# when Hydra looks for plugins it registers its own sources, but keeps one registered under the same class name
class FileConfigSource(Blocks, file_config_source.FileConfigSource):
    """A folder given by --config-dir or hydra.searchpath."""


class ImportlibResourcesConfigSource(Blocks, importlib_resources_config_source.ImportlibResourcesConfigSource):
    """A package."""


SourcesRegistry.instance().types |= {
    source.scheme(): source for source in (FileConfigSource, ImportlibResourcesConfigSource)
}
