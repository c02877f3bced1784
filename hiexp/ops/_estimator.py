"""scikit-learn's estimator conventions without scikit-learn: parameters, tags, and the checks of samples.

Where scikit-learn's own checks look for certain words in a message, these are in ours too.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any, Self

import numpy as np

from hiexp.ops._checks import describe, is_tensor
from hiexp.ops.clustering import as_array, as_rows


class Estimator:
    """Base of an estimator whose constructor stores its arguments unchanged under their own names."""

    n_features_in_: int

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor parameters by name; ``deep`` has no effect, there is nothing nested."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **params: Any) -> Self:
        """Set constructor parameters by name."""
        known = self._parameter_names()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"set_params: expected one of {', '.join(known)}, got {name!r}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = [f"{k}={v!r}" for k, v in self.get_params().items() if v is not defaults[k].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def _samples(self, X: Any, *, fitting: bool) -> np.ndarray:
        """``X`` as finite (n, d) float32 or float64 rows; sets or compares the features seen in ``fit``."""
        names = _feature_names(X)
        if not fitting:
            self._compare_names(names)
        rows = _dense(X)
        _check_layout(rows, 2 if fitting else 1, type(self).__name__)
        rows = as_rows("X", rows)
        # One pass without temporaries: NaN goes through min, which then compares false.
        if not (rows.min() > -np.inf and rows.max() < np.inf):
            raise ValueError(f"X: expected finite values, got NaN or infinity {_first_non_finite(rows)}")
        if fitting:
            self.n_features_in_ = rows.shape[1]
            self.__dict__.pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
            return rows
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {rows.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        return rows

    def _compare_names(self, names: np.ndarray | None) -> None:
        seen = getattr(self, "feature_names_in_", None)
        kind = type(self).__name__
        if names is None or seen is None:
            if names is not None:
                warnings.warn(f"X has feature names, but {kind} was fitted without feature names", stacklevel=4)
            elif seen is not None:
                warnings.warn(
                    f"X does not have valid feature names, but {kind} was fitted with feature names", stacklevel=4
                )
            return
        if names.tolist() == seen.tolist():
            return
        parts = ["The feature names should match those that were passed during fit.\n"]
        for title, some in (
            ("Feature names unseen at fit time:\n", sorted(set(names) - set(seen))),
            ("Feature names seen at fit time, yet now missing:\n", sorted(set(seen) - set(names))),
        ):
            if some:
                parts += [title, *(f"- {name}\n" for name in some[:5]), "- ...\n" * (len(some) > 5)]
        if len(parts) == 1:
            parts.append("Feature names must be in the same order as they were in fit.\n")
        raise ValueError("".join(parts))


def not_fitted(message: str) -> ValueError:
    """The error of a method that needs ``fit`` first: scikit-learn's own kind of ValueError where it is loaded."""
    exceptions = sys.modules.get("sklearn.exceptions")
    kind: type[ValueError] = exceptions.NotFittedError if exceptions else ValueError
    return kind(message)


def _feature_names(X: Any) -> np.ndarray | None:
    columns = getattr(X, "columns", None)
    if columns is None or is_tensor(X) or isinstance(X, np.ndarray):
        return None
    names = list(columns)
    if not names or not any(isinstance(name, str) for name in names):
        return None
    if not all(isinstance(name, str) for name in names):
        kinds = sorted({type(name).__name__ for name in names})
        raise TypeError(f"X: Feature names are only supported if all of them are strings, got {', '.join(kinds)}")
    return np.asarray(names, dtype=object)


def _dense(X: Any) -> np.ndarray:
    """``X`` as an array of numbers; whole objects are converted as scikit-learn converts them."""
    if hasattr(X, "tocsr"):
        got = f"{type(X).__name__} of shape {X.shape}"
        raise TypeError(f"X: expected a dense array; sparse input is not supported, got {got}")
    rows = as_array("X", X)
    if rows.dtype.kind == "c":
        raise ValueError(f"X: expected real numbers, got {describe(rows)}. Complex data not supported")
    if rows.dtype.kind not in "bO":
        return rows
    try:
        return rows.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise type(error)(f"X: expected numbers, got an object that is none: {error}") from error


def _check_layout(rows: np.ndarray, least: int, kind: str) -> None:
    if rows.ndim != 2:
        raise ValueError(
            f"X: expected shape (n, d), got {rows.ndim}-D {describe(rows)}. Reshape your data: X.reshape(-1, 1) for a "
            "single feature, X.reshape(1, -1) for a single sample"
        )
    n, d = rows.shape
    if d < 1:
        raise ValueError(
            f"X: expected columns, got 0 feature(s) (shape={(n, d)}) while a minimum of 1 is required by {kind}."
        )
    if n < least:
        raise ValueError(
            f"X: expected at least {least} rows, got {n} sample(s), n_samples = {n} (shape={(n, d)}) while a minimum "
            f"of {least} is required by {kind}."
        )


def _first_non_finite(rows: np.ndarray) -> str:
    for i, row in enumerate(rows):
        finite = np.isfinite(row)
        if not finite.all():
            return f"({row[finite.argmin()]} in row {i}, column {finite.argmin()})"
    raise AssertionError("called without a NaN or an infinity")
