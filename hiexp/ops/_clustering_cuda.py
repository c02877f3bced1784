"""Linkage on a GPU: checks of arguments and memory, then one call of ``hiexp._cuda`` on the caller's stream.

The methods whose clusters are centroids run there (csrc/clustering/cuda): ward, and average and weighted over cosine or
squared euclidean distances. Memory is about 10 n d + 390 n bytes beside X, taken from torch's allocator.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.ops._checks import describe, is_tensor

# Linkages with a GPU backend: method -> metrics.
CUDA_LINKAGES = {
    "ward": ("euclidean", "cosine"),
    "average": ("sqeuclidean", "cosine"),
    "weighted": ("sqeuclidean", "cosine"),
}
_DLPACK_CUDA = 2  # kDLCUDA


def wants_cuda(X: Any, device: Any) -> bool:
    """Whether the GPU is asked for: by ``device``, or without it by where ``X`` lives."""
    if device is not None:
        return str(device).split(":")[0] == "cuda"
    if is_tensor(X):
        return bool(X.is_cuda)
    return hasattr(X, "__dlpack_device__") and int(X.__dlpack_device__()[0]) == _DLPACK_CUDA


def linkage_cuda(X: Any, method: str, metric: str, threshold: float, device: Any, progress: Any) -> tuple[Any, Any]:
    """``hiexp.linkage`` on a GPU.

    Args:
        X: (n, d) torch tensor, cupy array or anything else with ``__dlpack__``, or a numpy array; half, float32 and
            float64 are used as they are, bfloat16 becomes float32, integers float64.
        method, metric, threshold, progress: as checked by ``hiexp.linkage``; infinity means no threshold.
        device: None (where ``X`` lives), or a CUDA device to take ``X`` to.

    Returns:
        Z (m, 4) float64 where ``X`` lives, and the stats.

    Raises:
        ValueError: no usable GPU, a linkage without a GPU backend, bad shapes or values.
        TypeError: a dtype that is not real.
        MemoryError: the device has too little free memory; says how much is needed. Raised before work starts.
    """
    native = _native(device)
    if metric not in CUDA_LINKAGES.get(method, ()):
        have = "; ".join(f"{name} with {' or '.join(metrics)}" for name, metrics in CUDA_LINKAGES.items())
        raise ValueError(f"method, metric: expected on a GPU one of {have}; got {method!r} with {metric!r}")
    torch = require("torch", "train", "hiexp.linkage on a GPU")
    tensor = _as_tensor(torch, X)
    n, d = _check_rows(torch, tensor)
    target = _target(torch, tensor, device, native)
    element = _element(torch, tensor)
    rows_bytes = 0 if _in_place(tensor, target, element) else n * d * element.itemsize
    workspace = _workspace(torch, native, n, d, target, rows_bytes)
    rows = tensor.to(target, element).contiguous()
    z, stats = native.linkage(
        rows.data_ptr(), native.LinkageElement.__members__[str(element).removeprefix("torch.")], n, d,
        native.LinkageMethod.__members__[method], native.LinkageMetric.__members__[metric], threshold,
        workspace.data_ptr(), target.index, torch.cuda.current_stream(target).cuda_stream, progress,
    )  # fmt: skip
    return _like(torch, X, tensor, z), stats


def _native(device: Any) -> Any:
    asked = "X: expected CPU memory" if device is None else "device: expected None or 'cpu'"
    got = "an array on a GPU" if device is None else repr(str(device))
    if find_spec("hiexp._cuda") is None:
        raise ValueError(f"{asked} (this hiexp was built without CUDA), got {got}")
    from hiexp import _cuda

    if _cuda.device_count() == 0:
        raise ValueError(f"{asked} (no CUDA device is usable here), got {got}")
    return _cuda


def _as_tensor(torch: Any, X: Any) -> Any:
    if is_tensor(X):
        return X.detach()
    if hasattr(X, "__dlpack__") and not isinstance(X, np.ndarray):
        return torch.from_dlpack(X)
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise ValueError(f"X: expected an (n, d) array, got {type(X).__name__}: {error}") from error
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise TypeError(f"X: expected real numbers (float16, float32 or float64), got {describe(array)}")
    native_order = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(native_order if native_order.flags.writeable else native_order.copy())


def _check_rows(torch: Any, tensor: Any) -> tuple[int, int]:
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"X: expected real numbers (float16, float32 or float64), got {describe(tensor)}")
    if tensor.ndim != 2:
        raise ValueError(f"X: expected shape (n, d), got {tensor.ndim}-D {describe(tensor)}")
    n, d = tensor.shape
    # Slots are int32, and so is twice their number in a few places.
    if n < 1 or d < 1 or n >= 2**30:
        raise ValueError(f"X: expected shape (n, d) with 1 <= n < 2**30 and d >= 1, got {(n, d)}")
    return n, d


def _target(torch: Any, tensor: Any, device: Any, native: Any) -> Any:
    """The CUDA device to run on, with its index."""
    target = tensor.device if device is None else torch.device(str(device))
    if target.index is None:
        target = tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())
    if target.index >= native.device_count():
        raise ValueError(f"device: expected one of cuda:0 .. cuda:{native.device_count() - 1}, got {str(target)!r}")
    return target


def _element(torch: Any, tensor: Any) -> Any:
    if tensor.dtype in (torch.float16, torch.float32, torch.float64):
        return tensor.dtype
    return torch.float32 if tensor.dtype == torch.bfloat16 else torch.float64


def _in_place(tensor: Any, target: Any, element: Any) -> bool:
    return bool(tensor.device == target and tensor.dtype == element and tensor.is_contiguous())


def _workspace(torch: Any, native: Any, n: int, d: int, target: Any, rows_bytes: int) -> Any:
    """Device memory for the run; MemoryError where it cannot be had beside a copy of X of ``rows_bytes``."""
    needed, free = native.linkage_memory(n, d, target.index)
    # What torch holds but does not use is free to it.
    free += torch.cuda.memory_reserved(target) - torch.cuda.memory_allocated(target)
    message = (
        f"X: clustering {n} rows of {d} coordinates needs {needed + rows_bytes} bytes on {target} "
        f"({(needed + rows_bytes) / 2**30:.2f} GiB), {free} ({free / 2**30:.2f} GiB) are free"
    )
    if needed + rows_bytes > free:
        raise MemoryError(message)
    try:
        return torch.empty(needed, dtype=torch.uint8, device=target)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{message}, but not in one piece") from error


def _like(torch: Any, X: Any, tensor: Any, z: np.ndarray) -> Any:
    if is_tensor(X) or tensor.is_cuda:
        result = torch.from_numpy(z).to(tensor.device)
        if is_tensor(X):
            return result
        library = require(type(X).__module__.split(".")[0], "gpu", "hiexp.linkage")  # cupy
        return library.from_dlpack(result)
    return z
