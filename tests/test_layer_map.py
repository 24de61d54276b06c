import pytest

from cab.layer_map import proportional


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (24, 12, [layer // 2 for layer in range(24)]),  # the paper's Vim and DeiT
        (12, 12, list(range(12))),
        (4, 12, [0, 3, 6, 9]),
        (5, 3, [0, 0, 1, 1, 2]),
        (3, 5, [0, 1, 3]),
        (1, 1, [0]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_proportional(student: int, teacher: int, expected: list[int]) -> None:
    assert proportional(student, teacher) == expected


def test_every_depth_stays_in_range_and_order() -> None:
    for student in range(1, 30):
        for teacher in range(1, 30):
            layers = proportional(student, teacher)
            assert layers == sorted(layers)
            assert 0 <= layers[0] <= layers[-1] < teacher


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="got 0 student layers and 12 teacher layers"):
        proportional(0, 12)
