"""Argument checks with one message format: ``<function>: expected <argument> ..., got ...``.

An op makes one :class:`ArgumentCheck` a call and passes each argument through it before anything is launched. Sizes
are bound by name at their first use ("batch dim length"), so a later argument that disagrees is reported by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ArgumentCheck:
    """Checks the tensors of one call of ``function``; ``sizes`` holds the sizes that are bound so far."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.sizes: dict[str, int] = {}
        self._device: torch.device | None = None

    def tensor(
        self, name: str, value: torch.Tensor, layouts: str | Sequence[str], dtypes: Sequence[torch.dtype] = FLOATING
    ) -> str:
        """Check type, device, dtype and shape of one tensor, bind its sizes, and return the layout that fits.

        Args:
            name: the argument's name, for the message.
            value: the argument.
            layouts: the shapes allowed, each a string of axis names ("batch dim length"); the first whose number of
                axes fits is taken.
            dtypes: the dtypes allowed.

        Raises:
            TypeError: not a tensor, or of another dtype.
            ValueError: on another device than the tensors before it, or of another shape.
        """
        layouts = (layouts,) if isinstance(layouts, str) else layouts
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{self.function}: expected {name} to be a tensor, got {type(value).__name__}")
        self.dtype(name, value, dtypes)
        if self._device is None:
            self._device = value.device
        elif value.device != self._device:
            raise ValueError(f"{self.function}: expected {name} on {self._device} like the rest, got {value.device}")
        for layout in layouts:
            axes = layout.split()
            if len(axes) == value.dim():
                self._bind(name, value, axes)
                return layout
        allowed = " or ".join(map(_describe, layouts))
        raise ValueError(f"{self.function}: expected {name} of shape {allowed}, got {tuple(value.shape)}")

    def dtype(self, name: str, value: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """Raise ``TypeError`` unless ``value`` is of one of ``dtypes``."""
        if value.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{self.function}: expected {name} of dtype {allowed}, got {got}")

    def true(self, condition: bool, expected: str, got: object) -> None:
        """Raise ``ValueError`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(f"{self.function}: expected {expected}, got {got}")

    def _bind(self, name: str, value: torch.Tensor, axes: list[str]) -> None:
        for axis, size in zip(axes, value.shape, strict=True):
            if self.sizes.setdefault(axis, size) != size:
                known = tuple(self.sizes.get(a, a) for a in axes)
                raise ValueError(
                    f"{self.function}: expected {name} of shape {_describe(' '.join(axes))} = {known}, "
                    f"got {tuple(value.shape)}"
                )


def _describe(layout: str) -> str:
    return f"({', '.join(layout.split())})"
