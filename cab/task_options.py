"""What a configuration says of a task whatever it trains on: bridges, weights, schedule, targets and layer map."""

from __future__ import annotations

from typing import Any, cast

from cab.bridge import Bridges
from cab.config import Config
from cab.distill.schedule import AlignmentSchedule, Kind
from cab.distill.targets import TargetKind
from cab.distill.task import LossWeights
from cab.layer_map import LEARNED, layer_map
from cab.students.student import Student
from cab.teachers.teacher import Teacher


def task_options(config: Config, student: Student, teacher: Teacher | None) -> dict[str, Any]:
    """The arguments of a :class:`cab.distill.task.DistillationTask` beside its student and its teacher.

    Args:
        config: of one arm.
        student: the Mamba model.
        teacher: None where no loss needs one; then there are neither bridges nor a layer map.
    """
    loss, bridge = config.loss, config.bridge
    options: dict[str, Any] = {
        "weights": LossWeights(kd=loss.kl, ce=loss.ce, temperature=loss.temperature),
        "schedule": AlignmentSchedule(cast(Kind, loss.schedule), loss.align, loss.until),
        "targets": cast(TargetKind, bridge.targets),
    }
    if teacher is not None:
        options["layer_map"] = layer_map(bridge.layer_map, student.num_layers, teacher.num_layers)
    if teacher is not None and bridge.enabled and bridge.aligns == "attention":
        options["attention"] = True
    elif teacher is not None and bridge.enabled:
        options["bridges"] = Bridges(
            layers=student.mamba_layers,
            directions=student.directions,
            d_state=student.d_state,
            hidden=bridge.hidden,
            key_width=teacher.key_width,
            query_width=teacher.query_width,
            shared=bridge.shared,
            teacher_layers=teacher.num_layers if bridge.layer_map == LEARNED else None,
        )
    return options
