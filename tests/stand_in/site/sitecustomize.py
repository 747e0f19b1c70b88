"""Python reads this as it starts, where this folder is on its path: in every process of a run."""

import ctypes
import importlib.util
import os
from pathlib import Path

if os.environ.get("STAND_IN_GPUS"):
    # Before torch: as it is imported it asks, once, whether there is a GPU.
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for each in (libraries / "libtorch_python.so", os.environ["STAND_IN_LIBRARY"]):
        ctypes.CDLL(str(each), ctypes.RTLD_GLOBAL)
    from tests.stand_in.gpu import install

    install(int(os.environ["STAND_IN_GPUS"]), Path(os.environ["STAND_IN_LIBRARY"]))
