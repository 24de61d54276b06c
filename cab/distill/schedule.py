"""How the weight of the alignment loss moves over a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["constant", "until", "ramp", "stages", "adaptive"]


@dataclass(frozen=True)
class AlignmentSchedule:
    """The weight of the alignment loss at a step.

    Attributes:
        kind: "constant"; "until": the weight, then nothing from the fraction ``until`` of the run on; "ramp": falls
            linearly from the weight to nothing at that fraction; "stages": as "until", and while the alignment has a
            weight it is the whole loss; "adaptive": the weight times the trust that it is given.
        weight: the weight at the start, at least 0.
        until: a fraction of the run in (0, 1], for "until", "ramp" and "stages".
    """

    kind: Kind = "constant"
    weight: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"AlignmentSchedule: expected kind to be one of {kinds}, got {self.kind!r}")
        if not self.weight >= 0:
            raise ValueError(f"AlignmentSchedule: expected weight of at least 0, got {self.weight}")
        if not 0 < self.until <= 1:
            raise ValueError(f"AlignmentSchedule: expected until in (0, 1], got {self.until}")

    def weight_at(self, step: int, total_steps: int, trust: float = 1.0) -> float:
        """The weight at ``step``, counted from 0, of a run of ``total_steps``; ``trust`` is for "adaptive" alone."""
        left = 1 - step / (self.until * total_steps)
        if self.kind in ("until", "stages"):
            return self.weight if left > 0 else 0.0
        if self.kind == "ramp":
            return self.weight * max(left, 0.0)
        if self.kind == "adaptive":
            return self.weight * trust
        return self.weight
