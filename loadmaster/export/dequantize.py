"""The tensors of an exported folder as a server multiplies with them, one at a time, whatever they are stored as."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from loadmaster.export.weights import read_tensor, tensor_files
from loadmaster.files import read_json


class ExportedTensors:
    """By the names of the base's files. compressed-tensors takes apart what it packed; the rest is read as it is."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, tensor_files(folder)

    @cached_property
    def packing(self) -> tuple[Any, Any]:
        """(compressed-tensors' compressor, its scheme), from config.json."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(read_json(self.folder / "config.json")["quantization_config"])
        return BaseCompressor.get_value_from_registry(config.format), next(iter(config.config_groups.values()))

    def read(self, name: str) -> Tensor:
        """In float32. Raises whatever reading a damaged tensor or config raises."""
        module = name.removesuffix("weight")
        if f"{module}weight_scale" not in self.files:
            return read_tensor(self.files[name], name).float()
        parts = {
            key.removeprefix(module): read_tensor(file, key)
            for key, file in self.files.items()
            if key.startswith(module) and "." not in key.removeprefix(module)
        }
        if parts["weight_scale"].dtype.itemsize > 1:  # NVFP4's are FP8, which it takes apart itself
            parts["weight_scale"] = parts["weight_scale"].float()
        compressor, scheme = self.packing
        return compressor.decompress(parts, scheme)["weight"].float()
