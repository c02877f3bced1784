"""The ``torch.library`` operator behind ``group_advantage``: torch.compile sees one node. No gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp._extras import require
from hiexp.ops._group_advantage_inputs import Tokens
from hiexp.ops._group_advantage_launch import Outputs, launch_torch

if TYPE_CHECKING:
    import torch
else:
    torch = require("torch", "train", "hiexp.group_advantage")


@torch.library.custom_op(
    "hiexp::group_advantage",
    mutates_args=(),
    schema="(Tensor rewards, Tensor labels, Tensor? offsets, Tensor? mask, SymInt width, SymInt total, "
    "str baseline, str scale, int ddof, float eps, str singleton, bool finite)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def operator(
    rewards: Any, labels: Any, offsets: Any, mask: Any, width: int, total: int,
    baseline: str, scale: str, ddof: int, eps: float, singleton: str, finite: bool,
) -> Outputs:  # fmt: skip
    """See ``_group_advantage_launch.Outputs``; arguments checked by ``group_advantage``."""
    tokens = Tokens(offsets, mask, width, total, None)
    return launch_torch(rewards, labels, tokens, (baseline, scale, ddof, eps, singleton), finite=finite)


@operator.register_fake
def _fake(rewards: Any, labels: Any, offsets: Any, mask: Any, width: int, total: int, *options: Any) -> Outputs:
    rows = rewards.shape[0]
    row = [rewards.new_empty(rows) for _ in range(3)]
    return (
        row[0], rewards.new_empty(rows, dtype=torch.bool), row[1], row[2], rewards.new_empty(rows, dtype=torch.int32),
        rewards.new_empty(total), rewards.new_empty(2, dtype=torch.int64),
    )  # fmt: skip
