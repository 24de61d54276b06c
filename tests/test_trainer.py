"""What the trainer adds: decay groups, one order of the data for all arms, equal results after an interruption."""

import json
import math
import multiprocessing
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerCallback

from cab.build import distillation_task, student_model, supervised_task, teacher_model
from cab.callbacks import METRICS, read_metrics
from cab.config import Config, UserError
from cab.data.vision import Digits, Splits, load
from cab.settings import of_arm, resolve
from cab.trainer import TaskTrainer, _replays

TINY = [
    "device=cpu",
    "student.depth=2",
    "student.embed_dim=16",
    "student.d_state=4",
    "teacher.depth=2",
    "teacher.embed_dim=16",
    "teacher.num_heads=2",
    "bridge.hidden=8",
    "optim.steps=6",
    "optim.batch_size=8",
    "log_every=2",
    "eval_every=3",
    "save_every=3",
]


def tiny(arm: str = "cab", *settings: str) -> Config:
    return of_arm(resolve(settings=[*TINY, f"arms={arm}", *settings]), arm)


@pytest.fixture(scope="module")
def splits() -> Splits:
    """The digits, and the first 20 images of the test split."""
    whole = load(tiny().data)
    test = whole.test
    return whole._replace(test=Digits(test.images[:20], test.labels[:20]))


def trainer(config: Config, splits: Splits, folder: Path) -> TaskTrainer:
    task = distillation_task(config, teacher_model(config, 10), 10)
    return TaskTrainer(task, config, folder, splits.train, splits.test, "tiny")


def figures(folder: Path) -> list[dict[str, Any]]:
    """The metrics without their times."""
    return [{**entry, "seconds": None, "samples_per_second": None} for entry in read_metrics(folder / METRICS)]


def test_decay_spares_what_it_would_spoil(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny(), splits, tmp_path)
    decayed = set(made.get_decay_parameter_names(made.model))
    spared = {name for name, _ in made.model.named_parameters()} - decayed
    mixer = "student.layers.1.mixer."
    assert {mixer + name for name in ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")} <= spared
    assert {"student.cls_token", "student.pos_embed", "student.norm_f.weight", "student.layers.0.norm.weight"} <= spared
    assert {"bridges.key.b1", "bridges.key.b2", "bridges.query.b1", "student.head.bias"} <= spared
    assert {mixer + f"{name}.weight" for name in ("in_proj", "x_proj", "x_proj_b", "dt_proj", "conv1d")} <= decayed
    assert {"bridges.key.w1", "bridges.query.w2", "student.head.weight", "student.patch_embed.proj.weight"} <= decayed


def test_the_optimiser_holds_student_and_bridges_and_not_the_teacher(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny(), splits, tmp_path)
    groups = made.create_optimizer().param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in made.model.parameters()}
    assert {id(parameter) for parameter in made.model.bridges.parameters()} < held
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


def test_arms_start_from_one_student_and_see_one_order(splits: Splits, tmp_path: Path) -> None:
    arms = ("soft-kd", "soft-kd-a0", "cab", "ce")
    students = [student_model(tiny(arm), 10).state_dict() for arm in arms]
    for name, value in students[0].items():
        if not name.endswith(("A_log", "A_b_log")):
            assert all(torch.equal(value, other[name]) for other in students[1:]), name
    orders = []
    for arm in ("soft-kd", "cab"):
        seen: list[Tensor] = []
        made = trainer(tiny(arm), splits, tmp_path / arm)
        made.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["images"]) if module.training else None,
            with_kwargs=True,
        )
        made.run()
        orders.append(torch.stack(seen))
    assert orders[0].shape == (6, 8, 3, 8, 8)
    assert torch.equal(orders[0], orders[1])


def test_two_runs_give_the_same_figures(splits: Splits, tmp_path: Path) -> None:
    for name in ("one", "two"):
        trainer(tiny(), splits, tmp_path / name).run()
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


class Interrupt(TrainerCallback):
    """Stops the process' training before the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings",
    [
        ("loss.schedule=ramp",),
        ("loss.schedule=adaptive", "bridge.targets=standardised", "optim.accumulation=2"),
        ("bridge.layer_map=learned",),
        ("loss.schedule=stages", "loss.until=0.7"),
    ],
    ids=["ramp", "adaptive", "learned layer map", "stages"],
)
def test_an_interrupted_run_ends_like_one_in_one_go(splits: Splits, tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = tiny("custom", *settings)
    straight = trainer(config, splits, tmp_path / "straight")
    straight.run()
    interrupted = trainer(config, splits, tmp_path / "interrupted")
    interrupted.add_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert [entry["step"] for entry in figures(tmp_path / "interrupted")] == [0, 2, 3, 3, 4]
    resumed = trainer(config, splits, tmp_path / "interrupted")
    resumed.run(resume=True)
    assert figures(tmp_path / "interrupted") == figures(tmp_path / "straight")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert any(name.startswith("bridges.") for name in resumed.model.state_dict())


def test_resuming_an_ended_run_changes_nothing(splits: Splits, tmp_path: Path) -> None:
    outcome = trainer(tiny(), splits, tmp_path).run()
    before = (tmp_path / METRICS).read_text()
    again = trainer(tiny(), splits, tmp_path).run(resume=True)
    assert again == outcome
    assert (tmp_path / METRICS).read_text() == before


def test_a_batch_that_the_processes_cannot_share_is_refused(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cab.processes.count", lambda: 3)
    with pytest.raises(UserError, match=r"^expected optim\.batch_size to be a multiple of the 3 processes, got 8$"):
        trainer(tiny(), splits, tmp_path)


def test_learning_rates_by_layer_are_refused_under_zero3(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cab.processes.count", lambda: 2)
    monkeypatch.setattr("cab.processes.by_deepspeed", lambda: True)
    with pytest.raises(UserError, match=r"^expected optim\.layer_decay=1 for DeepSpeed's ZeRO-3, got 0\.5$"):
        trainer(tiny("cab", "shard=true", "optim.layer_decay=0.5"), splits, tmp_path)


def test_the_launcher_s_precision_does_not_replace_the_run_s(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = trainer(tiny("cab", "precision=float32"), splits, tmp_path)
    assert (made.args.mixed_precision, made.accelerator.mixed_precision) == ("no", "no")


def test_accumulation_equals_a_big_batch(splits: Splits, tmp_path: Path) -> None:
    big = trainer(tiny("cab", "optim.batch_size=8"), splits, tmp_path / "big")
    small = trainer(tiny("cab", "optim.batch_size=4", "optim.accumulation=2"), splits, tmp_path / "small")
    losses = []
    for made in (big, small):
        made.run()
        losses.append([entry["loss"] for entry in made.metrics.entries if entry["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in big.model.state_dict().items():
        # Adam divides by the gradient's size, so that rounding shows where a gradient is all but 0.
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_graphed_step_takes_the_place_of_forward_and_backward(splits: Splits, tmp_path: Path) -> None:
    """Without a GPU, a step that does what the graph would replay stands in for it."""
    config = tiny("cab", "optim.batch_size=4", "optim.accumulation=2")
    trainer(config, splits, tmp_path / "eager").run()
    made = trainer(config, splits, tmp_path / "graphed")
    calls = []

    def graphed(**inputs: Tensor) -> dict[str, Tensor]:
        calls.append(inputs)
        outputs = made.model(**inputs)
        (outputs["loss"] / 2).backward()
        return {name: value.detach() for name, value in outputs.items()}

    made.graphed = graphed
    made.run()
    assert len(calls) == 12
    assert figures(tmp_path / "graphed") == figures(tmp_path / "eager")


def test_processes_that_load_end_with_the_run(splits: Splits, tmp_path: Path) -> None:
    """Left to the garbage collector, they would not hear that they are to end: it waits five seconds for each."""
    made = trainer(tiny("ce", "data.workers=1"), splits, tmp_path)
    made.run()
    assert not multiprocessing.active_children()


def test_a_graph_holds_no_exchange_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [tiny("cab", *words) for words in ([], ["bridge.targets=standardised"], ["graph=false"])]
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [_replays(config, cuda) for config in configs] == [True, True, False]
    assert [_replays(config, cpu) for config in configs] == [False, False, False]
    monkeypatch.setattr("cab.processes.count", lambda: 2)
    assert [_replays(config, cuda) for config in configs] == [True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["ce", "cab", "cab-adaptive", "attention"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_trains_like_the_eager_step(splits: Splits, tmp_path: Path, arm: str, precision: str) -> None:
    losses = []
    for graph in ("false", "true"):
        config = tiny(arm, "device=cuda", f"graph={graph}", f"precision={precision}", "loss.until=0.5", "log_every=1")
        made = trainer(config, splits, tmp_path / graph)
        assert (made.graphed is None) == (graph == "false")
        made.run()
        losses.append([entry["loss"] for entry in made.metrics.entries if entry["split"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "float32" else 1e-2)


def test_every_term_is_logged_as_the_mean_since_the_last_entry(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny("cab", "log_every=3"), splits, tmp_path)
    terms: list[dict[str, float]] = []
    made.model.register_forward_hook(
        lambda module, inputs, outputs: (
            terms.append({k: float(outputs[k]) for k in ("kl", "ce", "align")}) if module.training else None
        )
    )
    made.run()
    entries = [entry for entry in made.metrics.entries if entry["split"] == "train"]
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry, seen in zip(entries, (terms[:3], terms[3:]), strict=True):
        for name in ("kl", "ce", "align"):
            assert entry[name] == pytest.approx(sum(term[name] for term in seen) / 3, rel=1e-5)
        assert entry["loss"] == pytest.approx(entry["kl"] + entry["align"], rel=1e-5)


def test_the_schedule_moves_with_the_steps(splits: Splits, tmp_path: Path) -> None:
    config = tiny("custom", "loss.schedule=until", "loss.until=0.5", "loss.align=2", "log_every=1")
    made = trainer(config, splits, tmp_path)
    outcome = made.run()
    entries = [entry for entry in made.metrics.entries if entry["split"] == "train"]
    assert [entry["align_weight"] for entry in entries] == [2, 2, 2, 0, 0, 0]
    assert ["align" in entry for entry in entries] == [True] * 3 + [False] * 3
    assert "align" not in outcome.test


def test_stages_move_with_the_steps(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny("custom", "loss.schedule=stages", "loss.until=0.5", "log_every=1"), splits, tmp_path)
    made.run()
    entries = [entry for entry in made.metrics.entries if entry["split"] == "train"]
    assert [entry["loss"] for entry in entries[:3]] == [pytest.approx(entry["align"]) for entry in entries[:3]]
    assert [entry["loss"] for entry in entries[3:]] == [pytest.approx(entry["kl"]) for entry in entries[3:]]


def test_an_adaptive_weight_is_fed_by_the_trainer(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny("cab-adaptive", "optim.accumulation=2"), splits, tmp_path)
    made.run()
    keep = 1 - 1 / made.model.trust.HORIZON
    assert float(made.model.trust.weight) == pytest.approx(sum(keep**age for age in range(6)))
    assert math.isfinite(made.model.trust.total)


def test_evaluation_weighs_each_image_alike(splits: Splits, tmp_path: Path) -> None:
    """20 images in batches of 8: the last batch holds 4 and must not count for 8."""
    made = trainer(tiny(), splits, tmp_path)
    measured = made.evaluate()
    with torch.no_grad():
        labels = torch.tensor(splits.test.labels)
        whole = made.model.eval()(splits.test.images, labels)
    assert measured["eval_accuracy"] == pytest.approx(float((whole["logits"].argmax(-1) == labels).float().mean()))
    for name in ("kl", "ce", "align"):
        assert measured[f"eval_{name}"] == pytest.approx(float(whole[name]), rel=1e-4)
    assert list(tmp_path.iterdir()) == []  # what only measures writes nothing


def test_checkpoints_hold_no_pickled_arguments_and_load_strictly(splits: Splits, tmp_path: Path) -> None:
    trainer(tiny(), splits, tmp_path).run()
    checkpoint = tmp_path / "checkpoint-6"
    assert not (checkpoint / "training_args.bin").exists()
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert not any("teacher" in name for name in weights)
    del weights["bridges.key.w1"]
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: .bridges\.key\.w1"):
        trainer(tiny(), splits, tmp_path).run(resume=True)


@pytest.fixture(scope="module")
def interrupted(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training whose last checkpoint is that of step 3 of 6."""
    folder = tmp_path_factory.mktemp("interrupted")
    made = trainer(tiny("cab", "optim.ema=0.9"), splits, folder)
    made.add_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    return folder


@pytest.mark.parametrize("kept", [0.5, 0.0, None], ids=["cut", "emptied", "deleted"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "averaged.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "rng_state.pth",
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    splits: Splits, interrupted: Path, tmp_path: Path, name: str, kept: float | None
) -> None:
    checkpoint = shutil.copytree(interrupted, tmp_path / "run") / "checkpoint-3"
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if kept is not None:
        (checkpoint / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError) as caught:
        trainer(tiny("cab", "optim.ema=0.9"), splits, tmp_path / "run").run(resume=True)
    expected = f"expected a whole checkpoint in {checkpoint} (delete it to start its training again), got: "
    assert re.fullmatch(re.escape(expected) + r"\S.*", str(caught.value))


def test_a_checkpoint_of_other_processes_needs_no_random_state_of_this_one(
    splits: Splits, interrupted: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(interrupted, tmp_path / "run") / "checkpoint-3"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    trainer(tiny("cab", "optim.ema=0.9"), splits, tmp_path / "run").run(resume=True)
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


def test_metrics_that_are_damaged_or_missing_are_refused_in_one_line(splits: Splits, tmp_path: Path) -> None:
    trainer(tiny(), splits, tmp_path).run()
    file = tmp_path / METRICS
    file.write_text('{"step": 0, "spl\n' + file.read_text())
    with pytest.raises(UserError, match=f"^expected lines of JSON in {file}, got: Invalid control character"):
        trainer(tiny(), splits, tmp_path).run(resume=True)
    file.unlink()
    with pytest.raises(UserError, match=rf"^expected what was measured on the test split in {file}, got none$"):
        trainer(tiny(), splits, tmp_path).run(resume=True)


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_checkpoint_on_a_full_disk_is_refused_in_one_line(splits: Splits, tmp_path: Path, part: str) -> None:
    made = trainer(tiny(), splits, tmp_path)
    made.create_optimizer_and_scheduler(6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match=f"^expected a checkpoint that can be written, {tmp_path}, got: "):
            getattr(made, part)(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_of_the_training_is_none_of_its_checkpoint(splits: Splits, interrupted: Path, tmp_path: Path) -> None:
    made = trainer(tiny("cab", "optim.ema=0.9"), splits, shutil.copytree(interrupted, tmp_path / "run"))

    def failing(**inputs: Tensor) -> dict[str, Tensor]:
        raise KeyError("of the model")

    made.model.forward = failing
    with pytest.raises(KeyError, match="of the model"):
        made.run(resume=True)


def test_a_run_leaves_events_and_one_checkpoint(splits: Splits, tmp_path: Path) -> None:
    trainer(tiny("cab", "eval_every=4"), splits, tmp_path).run()
    assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) > 500
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 3, 4, 4, 6, 6]


def test_a_loss_that_is_no_number_ends_the_run(splits: Splits, tmp_path: Path) -> None:
    config = tiny("cab", "optim.lr=1e38", "log_every=1", "optim.warmup=0")
    with pytest.raises(
        UserError, match="^expected a finite loss, got nan at step 2, which trained on samples "
    ) as caught:
        trainer(config, splits, tmp_path).run()
    order = trainer(config, splits, tmp_path)._order()
    named = ", ".join(str(turn.sample) for turn in list(order)[8:16])
    assert f"on samples {named}; there is no checkpoint yet; a lower optim.lr may help" in str(caught.value)


def test_the_step_and_the_checkpoint_before_a_loss_that_is_no_number_are_named(splits: Splits, tmp_path: Path) -> None:
    """Logged every 100 steps, looked for every 3: the step is the one that failed, not the one that looked."""
    made = trainer(tiny("cab", "log_every=100"), splits, tmp_path)
    forward = made.model.forward

    def failing(**inputs: Tensor) -> dict[str, Tensor]:
        outputs = forward(**inputs)
        return {**outputs, "loss": outputs["loss"] * (math.nan if made.state.global_step == 4 else 1.0)}

    made.model.forward = failing
    good = re.escape(str(tmp_path / "checkpoint-3"))
    with pytest.raises(UserError, match=rf"at step 5, .*; the last good checkpoint is {good}; a lower"):
        made.run()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only where there is no GPU")
def test_refusal_of_a_missing_gpu(splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^expected a CUDA GPU for device=cuda, got none$"):
        trainer(tiny("cab", "device=cuda"), splits, tmp_path)


def test_a_teacher_is_trained_by_the_same_trainer(splits: Splits, tmp_path: Path) -> None:
    config = tiny(
        "ce", "optim.steps=80", "optim.batch_size=32", "optim.lr=3e-3", "teacher.embed_dim=64", "log_every=20"
    )
    made = TaskTrainer(supervised_task(teacher_model(config, 10)), config, tmp_path, splits.full, splits.test)
    made.run()
    losses = [entry["loss"] for entry in made.metrics.entries if entry["step"] in (20, 80) and "grad_norm" in entry]
    assert losses[1] < 0.9 * losses[0]


def test_progress_is_a_line_an_evaluation_where_there_is_no_terminal(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tiny(), splits, tmp_path).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["tiny: step 0/6", "tiny: step 3/6", "tiny: step 6/6"]


def test_averaged_weights_are_evaluated_kept_and_resumed(splits: Splits, tmp_path: Path) -> None:
    config = tiny("cab", "optim.ema=0.9", "optim.lr=0.01", "optim.warmup=0")
    straight = trainer(config, splits, tmp_path / "straight")
    measured = straight.run().test
    own = safetensors.torch.load_file(tmp_path / "straight" / "checkpoint-6" / "model.safetensors")
    averaged = safetensors.torch.load_file(tmp_path / "straight" / "checkpoint-6" / "averaged.safetensors")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, averaged[name])
    assert not torch.equal(own["student.head.weight"], averaged["student.head.weight"])
    labels = torch.tensor(splits.test.labels)
    with torch.no_grad():
        whole = straight.model.eval()(splits.test.images, labels)
    assert measured["kl"] == pytest.approx(float(whole["kl"]), rel=1e-4)
    interrupted = trainer(config, splits, tmp_path / "interrupted")
    interrupted.add_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    trainer(config, splits, tmp_path / "interrupted").run(resume=True)
    assert figures(tmp_path / "interrupted") == figures(tmp_path / "straight")


def test_the_learning_rate_falls_by_layer_and_over_the_run(splits: Splits, tmp_path: Path) -> None:
    made = trainer(tiny("cab", "optim.layer_decay=0.5", "optim.warmup=0", "optim.min_lr=1e-4"), splits, tmp_path)
    made.create_optimizer_and_scheduler(6)
    names = {parameter: name for name, parameter in made.model.named_parameters()}
    rates = {names[value]: group["lr"] for group in made.optimizer.param_groups for value in group["params"]}
    decays = {names[value]: group["weight_decay"] for group in made.optimizer.param_groups for value in group["params"]}
    assert rates.keys() == set(names.values())
    assert rates["student.head.weight"] == rates["bridges.key.w1"] == pytest.approx(1e-3)
    assert rates["student.layers.1.mixer.in_proj.weight"] == pytest.approx(5e-4)
    assert rates["student.layers.0.mixer.A_log"] == pytest.approx(2.5e-4)
    assert rates["student.patch_embed.proj.weight"] == pytest.approx(1.25e-4)
    spared = set(names.values()) - set(made.get_decay_parameter_names(made.model))
    assert {name for name, decay in decays.items() if decay == 0} == spared
    for _ in range(6):
        made.optimizer.step()
        made.lr_scheduler.step()
    assert made.lr_scheduler.get_last_lr()[-1] == pytest.approx(1e-4)


def test_gradients_layers_and_speed_are_logged_and_leave_the_training_as_it_is(splits: Splits, tmp_path: Path) -> None:
    runs = {}
    for logged in ("false", "true"):
        settings = ("bridge.targets=standardised", "student.drop_path=0.5", f"log_gradients={logged}", "arms=custom")
        made = trainer(tiny("custom", *settings), splits, tmp_path / logged)
        made.run()
        runs[logged] = [entry for entry in made.metrics.entries if entry["split"] == "train"]
    of_gradients = {"grad_kl", "grad_align", "grad_cosine"}
    for plain, entry in zip(runs["false"], runs["true"], strict=True):
        assert entry.keys() - plain.keys() == of_gradients
        assert all(math.isfinite(entry[name]) for name in of_gradients)
        assert {**plain, "seconds": 0, "samples_per_second": 0} == {
            name: 0 if name in ("seconds", "samples_per_second") else value
            for name, value in entry.items()
            if name not in of_gradients
        }
        assert sum(entry["align_layers"]) / 2 == pytest.approx(entry["align"], rel=1e-5)
        assert entry["samples_per_second"] > 0


def test_a_checkpoint_is_whole_or_not_there(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = trainer(tiny(), splits, tmp_path / "straight")
    straight.run()
    cut = trainer(tiny(), splits, tmp_path / "cut")
    save = cut._save_rng_state

    def killed(folder: str) -> None:
        save(folder)
        if made.state.global_step == 6:
            raise KeyboardInterrupt

    made = cut
    monkeypatch.setattr(cut, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert (tmp_path / "cut" / "unfinished" / "checkpoint-6" / "model.safetensors").is_file()
    with (tmp_path / "cut" / METRICS).open("a") as lines:
        lines.write('{"step": 6, "spl')  # a line that a kill has cut
    trainer(tiny(), splits, tmp_path / "cut").run(resume=True)
    assert figures(tmp_path / "cut") == figures(tmp_path / "straight")
    assert sorted(folder.name for folder in (tmp_path / "cut").iterdir()) == ["checkpoint-6", METRICS, "tensorboard"]


@pytest.mark.parametrize("decay", ["1", "0.5"], ids=["one rate", "layer decay"])
def test_a_learned_layer_map_is_trained_without_decay_logged_and_kept(
    splits: Splits, tmp_path: Path, decay: str
) -> None:
    settings = ("bridge.layer_map=learned", f"optim.layer_decay={decay}", "optim.lr=0.01", "optim.warmup=0")
    made = trainer(tiny("cab", *settings), splits, tmp_path)
    logits = made.model.bridges.layer_logits
    assert logits.shape == (2, 2)
    made.run()
    (group,) = (g for g in made.optimizer.param_groups if any(p is logits for p in g["params"]))
    assert group["weight_decay"] == 0
    assert (logits != 0).all()
    kept = safetensors.torch.load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert torch.equal(kept["bridges.layer_logits"], logits)
    last = [entry for entry in made.metrics.entries if entry["split"] == "train"][-1]
    assert last["layer_map"] == pytest.approx(logits.softmax(dim=1)[:, 1].tolist())
