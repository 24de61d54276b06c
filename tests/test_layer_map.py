import pytest

from cab.layer_map import layer_map, proportional


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("proportional", [0, 0, 1, 1]),
        ("learned", [0, 0, 1, 2]),
        ("last-1", [2, 2, 2, 2]),
        ("last-2", [1, 1, 2, 2]),
        ("last-3", [0, 0, 1, 2]),
        ("0, 0,2,2", [0, 0, 2, 2]),
    ],
)
def test_maps_by_name_or_list(text: str, expected: list[int]) -> None:
    teacher_layers = 2 if text == "proportional" else 3
    assert layer_map(text, 4, teacher_layers) == expected


@pytest.mark.parametrize(
    "text", ["first", "last-0", "last-4", "last-", "x-last-1", "0,1", "0,1,2,3", "0,2,1,1", "0,0,1,-1", ""]
)
def test_refusal_of_a_map(text: str) -> None:
    message = (
        "^layer_map: expected proportional, learned, last-1 to last-3, or 4 teacher layers from 0 to 2 that never go "
        "back, got "
    )
    with pytest.raises(ValueError, match=message + repr(text).replace("-", r"\-")):
        layer_map(text, 4, 3)
