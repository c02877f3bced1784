"""The model hub: asked once and briefly; where it does not answer, everything is looked for in the local cache."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.agent.http_pool import Connections, Request
from hiexp.agent.http_rules import check_url
from hiexp.preflight.check import Check

if TYPE_CHECKING:
    from hiexp.rl.config import TrainConfig

_PATIENCE_S = 3.0
# Where the libraries look, each time, whether they may use the network.
_SWITCHES = (("huggingface_hub", "huggingface_hub.constants"), ("datasets", "datasets.config"))


@contextlib.contextmanager
def bounded_hub(config: TrainConfig, checks: list[Check]) -> Iterator[None]:
    """Within, loading never waits for a hub that is away: then it is switched off, and a check says so."""
    names = hub_names(config)
    if not names or importlib.util.find_spec("huggingface_hub") is None or is_offline() or hub_answers():
        yield
        return
    modules: list[Any] = [
        importlib.import_module(name) for package, name in _SWITCHES if importlib.util.find_spec(package)
    ]
    before = [module.HF_HUB_OFFLINE for module in modules]
    checks.append(Check(
        "hub", "warn", f"{_endpoint()} does not answer (asked for {_PATIENCE_S:g} s): looked in the cache for "
        f"{', '.join(names)}",
        "with all of them in the cache, train with HF_HUB_OFFLINE=1; else fetch them first, or name local folders",
    ))  # fmt: skip
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def hub_names(config: TrainConfig) -> list[str]:
    """What the config names that is no file here: models, encoders and data sets of the hub."""
    from hiexp.tasks.data_sets import split_label
    from hiexp.tasks.qa import is_hub_source, split_sources

    model, task, tool = config.model.path, config.task, config.tool
    found = [model] if is_hub_model(model) and config.rollout.server_api != "chat" else []
    for source in (task.train, task.evaluation):
        names = [split_label(name)[1] for name, _ in split_sources(source)] if source else []
        found += [name for name in names if is_hub_source(name)]
    encoder = tool.encoder.removeprefix("st:").partition("?")[0]
    if tool.kind == "dense" and tool.index is not None and encoder != tool.encoder and is_hub_model(encoder):
        found.append(encoder)
    return list(dict.fromkeys(found))


def is_hub_model(path: str) -> bool:
    """Whether ``path`` can only be the name of a model on the hub."""
    return bool(path) and not path.startswith(("package:", "/", "./", "../", "~")) and not Path(path).is_dir()


def is_offline() -> bool:
    """Whether the hub is switched off, by the user or by :func:`bounded_hub`."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return True
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """Whether the hub gives any answer in time; in a thread, because looking up a name cannot be bounded otherwise."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            Connections(check_url("HF_ENDPOINT", _endpoint()), 1).send(Request("HEAD", "", None, {}), _PATIENCE_S)
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return answered.is_set()


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
