"""verl's ``core_algos`` without verl's runtime: ray, tensordict and hydra are not needed for its advantage functions.

``load()`` imports the installed package where that works; otherwise it executes that one file of it, with empty
modules in place of the imports that its advantage functions and registries never use. Tests and benchmarks share it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MODULE = "verl.trainer.ppo.core_algos"


def load() -> ModuleType | None:
    """The module, None where verl is not installed."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return None
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    try:
        return importlib.import_module(MODULE)
    except ImportError:
        return _load_file(Path(next(iter(spec.submodule_search_locations))))


def _load_file(package: Path) -> ModuleType:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("verl", "omegaconf")}
    for name in before:
        del sys.modules[name]
    try:
        _stub("omegaconf", DictConfig=dict)
        for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.workers"):
            _stub(name)
        _stub("verl.utils.torch_functional")
        _stub("verl.trainer.config", AlgoConfig=SimpleNamespace)
        _stub("verl.workers.config", ActorConfig=SimpleNamespace)
        _stub("verl.utils.import_utils", deprecated=lambda *_: lambda function: function)
        _stub("verl.utils.device", get_device_name=lambda: "cpu")
        groupwise = _execute("verl.utils.groupwise", package / "utils" / "groupwise.py")
        for name in ("as_torch_index", "group_mean_std"):
            setattr(sys.modules["verl.utils"], name, getattr(groupwise, name))
        return _execute(MODULE, package / "trainer" / "ppo" / "core_algos.py")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("verl", "omegaconf")]:
            del sys.modules[name]
        sys.modules.update(before)


def _stub(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file of verl")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
