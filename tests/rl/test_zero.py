"""What DeepSpeed is refused with; that it trains what one process trains is in test_distributed.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from hiexp.rl.config import TrainConfig

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")


def configured(zero=None, *, processes=2, zero3_init=False, fp16=False, dtype=torch.float32):
    """Stage and settings after hiexp.rl.zero.configure."""
    from hiexp.rl.zero import configure

    settings = {"zero_optimization": {"stage": 2} | (zero or {}), "fp16": {"enabled": fp16}, "gradient_clipping": 7.0}
    plugin = SimpleNamespace(deepspeed_config=settings, zero3_init_flag=zero3_init, dschf=object())
    accelerator = SimpleNamespace(num_processes=processes, state=SimpleNamespace(deepspeed_plugin=plugin))
    config = TrainConfig.from_dict({"algorithm": {"max_grad_norm": 0.5}})
    return configure(accelerator, config, SimpleNamespace(dtype=dtype)), settings, plugin


def test_training_decides_about_clipping_and_accumulation():
    stage, settings, plugin = configured()
    assert stage == 2
    assert (settings["gradient_clipping"], settings["gradient_accumulation_steps"]) == (0.5, 1)
    # transformers would load empty weights while this is alive.
    assert plugin.dschf is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": {"stage": 0}}, "expected zero_stage 1, 2 or 3, got 0"),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, "expected offload_optimizer none, got cpu"),
        ({"zero": {"offload_param": {"device": "nvme"}}}, "expected offload_param none, got nvme"),
        ({"processes": 1}, "expected two or more processes"),
        ({"zero3_init": True}, "expected zero3_init_flag false"),
        ({"fp16": True}, "got fp16"),
        ({"dtype": torch.bfloat16}, "model.dtype: expected float32"),
    ],
)
def test_what_was_never_tried_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configured(**settings)
