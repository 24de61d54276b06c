"""How the weight of the alignment loss moves over a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlignmentSchedule:
    """The weight of the alignment loss at a step.

    Attributes:
        kind: "constant"; "until": the weight, then nothing from the fraction ``until`` of the run on; "ramp": falls
            linearly from the weight to nothing at that fraction.
        weight: the weight at the start, at least 0.
        until: a fraction of the run in (0, 1]; "constant" has no use for it.
    """

    kind: Literal["constant", "until", "ramp"] = "constant"
    weight: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "until", "ramp"):
            raise ValueError(f"AlignmentSchedule: expected kind 'constant', 'until' or 'ramp', got {self.kind!r}")
        if not self.weight >= 0:
            raise ValueError(f"AlignmentSchedule: expected weight of at least 0, got {self.weight}")
        if not 0 < self.until <= 1:
            raise ValueError(f"AlignmentSchedule: expected until in (0, 1], got {self.until}")

    def weight_at(self, step: int, total_steps: int) -> float:
        """The weight at ``step``, counted from 0, of a run of ``total_steps``."""
        left = 1 - step / (self.until * total_steps)
        if self.kind == "constant":
            return self.weight
        if self.kind == "until":
            return self.weight if left > 0 else 0.0
        return self.weight * max(left, 0.0)
