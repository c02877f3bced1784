"""Out of memory in an update: what counts as it, and a token budget that is halved until the work fits.

Micro-batches are only a way to cut an update, so a smaller budget gives the same gradient up to rounding.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hiexp.rl.batch import MicroBatch

T = TypeVar("T")
# torch's CPU allocator and CUDA libraries raise plain RuntimeErrors.
_PHRASES = ("not enough memory", "out of memory", "can't allocate memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the host or on a GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


class TokenBudget:
    """Tokens per micro-batch. ``retries`` counts how often memory ran out since it was last set to 0."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.retries = 0

    def run(
        self,
        cut: Callable[[int], Sequence[MicroBatch]],
        work: Callable[[Sequence[MicroBatch]], T],
        clean: Callable[[], None],
        what: str,
    ) -> T:
        """``work(cut(tokens))``, again with half the tokens where memory runs out; ``clean`` drops what was half done.

        Raises:
            MemoryError: it runs out with a single rollout per micro-batch.
        """
        while True:
            batches = cut(self.tokens)
            try:
                return work(batches)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            # Outside the handler: the traceback held the activations of the failed pass.
            clean()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._shrink(batches, what, reason)

    def _shrink(self, batches: Sequence[MicroBatch], what: str, reason: str) -> None:
        largest = max(batch.input_ids.numel() for batch in batches)
        if all(len(batch.indices) == 1 for batch in batches):
            raise MemoryError(
                f"{what}: out of memory with one rollout of {largest} tokens per micro-batch ({reason}); lower "
                "rollout.max_total_tokens, or set model.gradient_checkpointing: true"
            )
        before, self.tokens = self.tokens, max(1, min(self.tokens, largest) // 2)
        self.retries += 1
        warnings.warn(
            f"{what}: out of memory ({reason}); again with {self.tokens} instead of {before} tokens per micro-batch",
            RuntimeWarning,
            stacklevel=3,
        )


def return_freed_memory() -> None:
    """Give freed host memory back to the system where the C library is glibc; elsewhere nothing happens.

    Its heap keeps what rollouts and updates free, in holes that the other's blocks do not fit, and grows instead.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory(device: Any) -> dict[str, float | None]:
    """``peak_rss_mb`` of this process since its start, and ``peak_cuda_mb`` of ``device`` since the last call."""
    # Linux counts in KiB, macOS in bytes.
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cuda = None
    if torch.device(device).type == "cuda":
        cuda = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
    return {"peak_rss_mb": rss, "peak_cuda_mb": cuda}
