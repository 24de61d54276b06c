import pytest

from cab.token_map import TokenLayout, token_map


def test_middle_class_token_meets_the_teachers_first() -> None:
    student = TokenLayout((2, 2), cls=2, patches=(0, 1, 3, 4))
    teacher = TokenLayout((2, 2), cls=0, patches=(1, 2, 3, 4))
    assert token_map(student, teacher) == [1, 2, 0, 3, 4]


def test_registers_are_skipped() -> None:
    student = TokenLayout((1, 2), cls=1, patches=(0, 2))
    teacher = TokenLayout((1, 2), cls=0, patches=(5, 6))
    assert token_map(student, teacher) == [5, 0, 6]


def test_no_class_token_on_one_side_is_left_out() -> None:
    student = TokenLayout((1, 2), cls=1, patches=(0, 2))
    teacher = TokenLayout((1, 2), cls=None, patches=(0, 1))
    assert token_map(student, teacher) == [0, -1, 1]


def test_finer_teacher_grid_is_sampled_at_the_centres() -> None:
    student = TokenLayout((1, 2), cls=None, patches=(0, 1))
    teacher = TokenLayout((3, 6), cls=None, patches=tuple(range(18)))
    assert token_map(student, teacher) == [6 + 1, 6 + 4]


def test_coarser_teacher_grid_is_repeated() -> None:
    student = TokenLayout((2, 4), cls=None, patches=tuple(range(8)))
    teacher = TokenLayout((1, 2), cls=None, patches=(0, 1))
    assert token_map(student, teacher) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_patches_must_fill_the_grid() -> None:
    with pytest.raises(ValueError, match="expected 2 x 2 patches, got 3"):
        TokenLayout((2, 2), cls=None, patches=(0, 1, 2))
