import pytest

from cab.distill.schedule import AlignmentSchedule


def test_constant() -> None:
    schedule = AlignmentSchedule(weight=3.0)
    assert [schedule.weight_at(step, 10) for step in (0, 9)] == [3.0, 3.0]


def test_until_stops_at_the_fraction() -> None:
    schedule = AlignmentSchedule("until", weight=2.0, until=0.5)
    assert [schedule.weight_at(step, 10) for step in (0, 4, 5, 9)] == [2.0, 2.0, 0.0, 0.0]


def test_ramp_falls_to_nothing() -> None:
    schedule = AlignmentSchedule("ramp", weight=2.0, until=0.5)
    assert [schedule.weight_at(step, 8) for step in (0, 2, 4, 7)] == [2.0, 1.0, 0.0, 0.0]


def test_stages_weigh_as_until_does() -> None:
    schedule = AlignmentSchedule("stages", weight=2.0, until=0.5)
    assert [schedule.weight_at(step, 10) for step in (0, 4, 5, 9)] == [2.0, 2.0, 0.0, 0.0]


def test_adaptive_follows_the_trust() -> None:
    schedule = AlignmentSchedule("adaptive", weight=2.0)
    assert [schedule.weight_at(0, 8, trust) for trust in (1.0, 0.25, 0.0)] == [2.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "cosine"},
            "expected kind to be one of 'constant', 'until', 'ramp', 'stages', 'adaptive', got 'cosine'",
        ),
        ({"weight": -1.0}, "expected weight of at least 0, got -1.0"),
        ({"weight": float("nan")}, "expected weight of at least 0, got nan"),
        ({"until": 0.0}, r"expected until in \(0, 1\], got 0.0"),
    ],
    ids=["kind", "weight", "nan", "until"],
)
def test_bad_schedules(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentSchedule(**arguments)
