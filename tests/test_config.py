"""A configuration is merged in one order, typed by its fields, and refuses what it does not know in one line."""

import re
from pathlib import Path

import pytest

from cab.config import LanguageConfig, OptimConfig, UserError, VisionConfig
from cab.presets import ARMS, PRESETS
from cab.settings import flatten, of_arm, of_run, resolve, to_yaml


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.lrr=1"], "expected a known key, got 'optim.lrr'; did you mean 'optim.lr'?"),
        (["xyz=1"], "expected a known key, got 'xyz'"),
        (["optim=1"], "expected a known key, got 'optim'"),
        (["optim.lr"], "expected --set key=value, got 'optim.lr'"),
        (["optim.lr=fast"], "expected optim.lr to be a number, got 'fast'"),
        (["optim.lr=0"], "expected optim.lr to be above 0, got 0.0"),
        (["optim.lr=inf"], "expected optim.lr to be finite, got inf"),
        (["optim.steps=2.5"], "expected optim.steps to be a whole number, got '2.5'"),
        (["optim.steps=0"], "expected optim.steps to be at least 1, got 0"),
        (["data.fraction=1.5"], "expected data.fraction to be at most 1, got 1.5"),
        (["bridge.enabled=maybe"], "expected bridge.enabled to be true or false, got 'maybe'"),
        (["student.depth=deep"], "expected student.depth to be a whole number or none, got 'deep'"),
        (["device=tpu"], "expected device to be one of auto, cpu, cuda, got 'tpu'"),
        (["arms=cabs"], f"expected arm to be one of {', '.join(ARMS)}, got 'cabs'; did you mean 'cab'?"),
        (["data.name=folders"], "expected data.name to be digits, folder, torch/NAME or hfds/NAME, got 'folders'"),
        (["data.name=torch/"], "expected data.name to be digits, folder, torch/NAME or hfds/NAME, got 'torch/'"),
        (
            ["data.name=wds/imagenet"],
            "expected data.name to be a data set whose images have an index (torch/NAME or hfds/NAME), got "
            "'wds/imagenet', which streams them",
        ),
        (["teacher.image_size=7"], "expected teacher.image_size to be a multiple of teacher.patch_size=2, got 7"),
        (["optim.min_lr=1"], "expected optim.min_lr of at most optim.lr=0.001, got 1.0"),
        (["arms=cab,cab"], "expected each arm once, got cab, cab"),
        (["arms=[]"], f"expected arm to be one of {', '.join(ARMS)}, got ''"),
        (["data.image_size=7"], "expected data.image_size to be a multiple of teacher.patch_size=2, got 7"),
        (["data.name=folder"], "expected data.root, a folder with train/CLASS and val/CLASS, got none"),
        (["loss.kl=0"], "expected loss.kl, loss.ce or a constant loss.align above 0, got nothing to learn from"),
        (
            ["loss.kl=0", "loss.ce=1", "loss.schedule=adaptive", "arms=cab"],
            "expected loss.kl above 0 for loss.schedule=adaptive, which compares with it, got 0.0",
        ),
        (
            ["loss.schedule=stages"],
            "expected loss.until below 1 for loss.schedule=stages, whose second stage follows, got 1.0",
        ),
        (
            ["teacher.steps=0"],
            "expected teacher.pretrained, teacher.weights or teacher.steps, got a teacher without any",
        ),
        (
            ["arms=cab", "student.a_init=s4d"],
            "expected student.a_init=zero, which arm 'cab' fixes, got 's4d'; use --set arms=custom to choose it freely",
        ),
    ],
)
def test_refusal(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(settings=settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_error_names_the_preset_meant() -> None:
    names = ", ".join(PRESETS)
    with pytest.raises(UserError, match=rf"^expected preset to be one of {names}, got 'digit'; did you mean"):
        resolve("digit")


def test_a_section_checks_itself_without_a_file_or_a_command_line() -> None:
    with pytest.raises(UserError, match=r"^expected optim\.steps to be a whole number, got True$"):
        OptimConfig(steps=True)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("optim:\n  lr: 1e-4\n  steps: 7\nseed: 3\n")
    config = resolve(file=file, settings=["optim.steps=9"])
    assert (config.optim.batch_size, config.optim.lr, config.optim.steps, config.seed) == (32, 1e-4, 9, 3)


def test_a_file_may_name_its_preset_and_the_command_line_another(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("preset: vision\ndata: {root: images}\n")
    assert resolve(file=file).student.name == "vim_tiny_patch16_224"
    assert resolve("digits", file).student.name == "vim_micro_patch2_8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected keys and values in .*my.yaml, got list"),
        ("a: [", "expected YAML in .*my.yaml, got while parsing"),
        ("optim: {lr: [1]}", r"expected optim.lr to be a number, got \[1\]"),
        ("arms: [1]", r"expected arms to be a list of names, got \[1\]"),
        ("preset: 3", f"expected preset to be one of {', '.join(PRESETS)}, got 3"),
        ("3: 4", "expected a known key, got '3'"),
    ],
)
def test_refusal_of_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{message}"):
        resolve(file=file)


def test_refusal_of_a_missing_file_and_of_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^expected a configuration file, got no file {re.escape(str(tmp_path))}/no$"):
        resolve(file=tmp_path / "no")
    with pytest.raises(UserError, match=r"^expected the folder of a run, got no folder .*/no$"):
        of_run(tmp_path / "no")
    with pytest.raises(UserError, match=r"^expected the folder of a run, got .* without config\.yaml$"):
        of_run(tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_read_back(preset: str, tmp_path: Path) -> None:
    own = {
        VisionConfig: ["data.root=a b: c", "data.index=none"],
        LanguageConfig: ["data.path=a b: c", "teacher.name=x"],
    }
    config = resolve(preset, settings=["optim.lr=1e-5", *own[PRESETS[preset].kind]])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert of_run(tmp_path) == config


def test_every_value_is_explained() -> None:
    lines = to_yaml(resolve()).splitlines()
    assert len(lines) > 40
    assert all(re.search(r"  # \w", line) for line in lines)


def differing(first: str, second: str) -> set[str]:
    config = resolve()
    one, other = flatten(of_arm(config, first)), flatten(of_arm(config, second))
    return {key for key in one if one[key] != other[key]} - {"arms"}


def test_controls_differ_from_the_bridge_in_what_they_control_for() -> None:
    assert differing("cab", "soft-kd-a0") == {"bridge.enabled"}
    assert differing("soft-kd", "soft-kd-a0") == {"student.a_init"}
    assert differing("cab", "cab-s4d") == {"student.a_init"}
    assert differing("cab", "cab-adaptive") == {"loss.schedule"}
    assert differing("cab", "attention") == {"bridge.aligns"}
    assert differing("cab", "cab-softmax") == {"bridge.targets", "loss.align"}
    assert differing("soft-kd", "ce") == {"loss.kl", "loss.ce"}


def test_flags_are_settings_that_set_wins_over(tmp_path: Path) -> None:
    assert resolve(data="images", settings=["data.fraction=0.5"]).data.root == "images"
    config = resolve("imagenet-vim-tiny", data="images", settings=["data.root=others"])
    assert (config.data.name, config.data.root, config.optim.steps) == ("folder", "others", 600_000)
    text = resolve("lm-local", data="notes.txt")
    assert (text.data.name, text.data.path) == ("files", "notes.txt")
    (tmp_path / "my.yaml").write_text("preset: lm-local\n")
    assert resolve(file=tmp_path / "my.yaml", data="notes.txt").data.path == "notes.txt"


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.2])
def test_the_published_low_data_recipe_has_one_budget(fraction: float) -> None:
    config = resolve("imagenet-vim-tiny", data="x", settings=[f"data.fraction={fraction}"])
    epochs = config.optim.steps * config.optim.batch_size / (fraction * 1_281_167)
    assert epochs == pytest.approx({0.01: 3000, 0.05: 600, 0.1: 300, 0.2: 150}[fraction], rel=2e-3)
    assert config.optim.lr == pytest.approx(6.25e-5)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("name", "aligned"), [("full", 35), ("full-50", 50)])
def test_the_published_recipe_for_all_data_stops_aligning(size: str, name: str, aligned: int) -> None:
    config = resolve(f"imagenet-vim-{size}-{name}", data="x")
    epochs = config.optim.steps * config.optim.batch_size / 1_281_167
    assert (epochs, config.data.fraction) == (pytest.approx(300, rel=1e-5), 1.0)
    assert (config.loss.schedule, config.loss.until * epochs) == ("until", pytest.approx(aligned, rel=1e-4))
    assert (config.teacher.name, config.student.name) == (f"deit_{size}_patch16_224", f"vim_{size}_patch16_224")


def test_the_published_stages_of_a_language_model() -> None:
    config = resolve("lm-stages", data="text", settings=["teacher.name=x"])
    of_a_step = config.optim.batch_size * config.optim.accumulation * config.data.length
    aligned = config.optim.steps * config.loss.until
    assert (config.loss.schedule, config.arms) == ("stages", ("cab",))
    assert aligned * of_a_step == pytest.approx(200e6, rel=1e-3)
    assert (config.optim.steps - aligned) * of_a_step == pytest.approx(2e9, rel=1e-3)


def test_every_control_is_trained_beside_the_method() -> None:
    config = resolve("imagenet-vim-tiny-controls", data="x")
    assert set(config.arms) == ARMS.keys() - {"custom", "cab-adaptive"}
    low_data = resolve("imagenet-vim-tiny", data="x")
    assert {key for key, value in flatten(config).items() if flatten(low_data)[key] != value} == {"preset", "arms"}


def test_the_published_code_s_recipe() -> None:
    (name,) = resolve("imagenet-vim-tiny-code", data="x").arms
    arm = of_arm(resolve("imagenet-vim-tiny-code", data="x"), name)
    assert (arm.bridge.targets, arm.loss.align, arm.student.a_init) == ("softmax", 3.0, "zero")
    assert (arm.data.mixup, arm.data.cutmix, arm.data.smoothing, arm.optim.ema) == (0.8, 1.0, 0.1, 0.99996)
