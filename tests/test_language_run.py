"""Language models from the command line: whole runs in seconds, and one line for whatever the user can put right."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from language_models import TINY_RUN, make
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from cab.cli import main
from cab.config import UserError
from cab.distill.task import LossWeights
from cab.distill.token_losses import Divergence
from cab.language_run import LanguageRun
from cab.settings import resolve
from cab.students.discrete_mamba2 import SUPPORTED
from cab.trainer import TaskTrainer


def distill(*settings: str, preset: str = "lm-local") -> list[str]:
    return ["distill", "--preset", preset, *(word for setting in (*TINY_RUN, *settings) for word in ("--set", setting))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*distill("arms=soft-kd-a0,cab"), "--out", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> dict[str, dict]:
    results = json.loads((folder / "results.json").read_text())
    assert results["measure"] == "perplexity"
    return {row["name"]: row for row in results["rows"]}


def test_a_run_leaves_all_that_it_promises(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == {
        *(
            ".lock",
            "cab",
            "config.yaml",
            "curves.png",
            "files.json",
            "results.json",
            "soft-kd-a0",
            "teacher",
            "teacher-model",
        ),
    }
    names = {file.name for file in (finished / "cab").iterdir()}
    assert names == {"checkpoint-2", "metrics.jsonl", "result.json", "student", "tensorboard"}
    rows = rows_of(finished)
    assert list(rows) == ["teacher", "soft-kd-a0", "cab"]
    assert all(1 < row["score"] < 1000 for row in rows.values())
    assert rows["cab"]["alignment"] > 0


def test_perplexity_is_that_of_the_test_text(finished: Path) -> None:
    """By hand: every token of the held-out text but the first predicted once, in the first window that holds it."""
    from cab.data.language import load
    from cab.settings import of_run

    stream = load(of_run(finished).data).test.stream.long()
    model = AutoModelForCausalLM.from_pretrained(finished / "cab" / "student")
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream) - 15, 8):
            window = stream[start : start + 16]
            losses = nn.functional.cross_entropy(model(window[None]).logits[0, :-1, :257], window[1:], reduction="none")
            fresh = losses if start == 0 else losses[-8:]
            total, count = total + fresh.sum().item(), count + len(fresh)
    assert rows_of(finished)["cab"]["score"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_eval_measures_what_the_run_reported(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished)]) == 0
    rows = rows_of(finished)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, f"{rows[name]['score']:.3f}"] for name in ("soft-kd-a0", "cab")
    ]


def test_eval_beyond_the_length_that_was_learnt(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cab.run import evaluate

    _, short = evaluate(finished)
    _, long = evaluate(finished, length=128)  # eight times the length, over the same 200 tokens
    assert [row.name for row in long] == ["soft-kd-a0", "cab"]
    assert all(abs(math.log(a.score / b.score)) < 0.5 and a.score != b.score for a, b in zip(short, long, strict=True))
    (tmp_path / "other.txt").write_text("xyz " * 500)
    assert main(["eval", str(finished), "--data", str(tmp_path / "other.txt"), "--length", "64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_recall_of_teacher_and_students(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sequences of 4 and 8 pairs fit 32 tokens."""
    assert main(["eval", str(finished), "--mqar", "--length", "32"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    saved = json.loads((finished / "mqar.json").read_text())
    assert (lines[0].split(), saved["pairs"]) == (["recall", "of", "pairs", "4", "8"], [4, 8])
    assert list(saved["accuracy"]) == ["teacher", "soft-kd-a0", "cab"]
    for line, (name, shares) in zip(lines[1:-1], saved["accuracy"].items(), strict=True):
        assert line.split() == [name, *(f"{share:.1%}" for share in shares)]
        assert all(0 < share < 0.5 for share in shares)
    assert lines[-1].split() == ["chance", "25.0%", "12.5%"]
    (finished / "mqar.json").unlink()


def test_recall_of_sequences_too_short(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), "--mqar", "--length", "15"]) == 2
    expected = "expected sequences of at least 16 tokens and as many as 8 different ones in the test text for --mqar"
    assert capsys.readouterr().err.startswith(f"cab eval: {expected}, got 15 and ")


def test_perplexity_against_the_position(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, for up to eight times the length: 200 tokens hold one sequence of 128."""
    from cab.data.language import load
    from cab.settings import of_run

    assert main(["eval", str(finished), "--positions"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    saved = json.loads((finished / "positions.json").read_text())
    (finished / "positions.json").unlink()
    assert (lines[0].split()[3:], saved["ends"]) == (["0-16", "16-32", "32-64", "64-128"], [16, 32, 64, 128])
    assert list(saved["perplexity"]) == ["teacher", "soft-kd-a0", "cab"]
    sequence = load(of_run(finished).data).test.stream[:128].long()
    model = AutoModelForCausalLM.from_pretrained(finished / "cab" / "student")
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(sequence[None]).logits[0, :-1, :257], sequence[1:], reduction="none")
    by_hand = [losses[:15], losses[15:31], losses[31:63], losses[63:]]
    assert saved["perplexity"]["cab"] == pytest.approx([part.mean().exp().item() for part in by_hand], rel=1e-4)
    assert lines[-1].split() == ["cab", *(f"{value:.3f}" for value in saved["perplexity"]["cab"])]


def test_positions_that_the_text_or_the_teacher_does_not_reach(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["eval", str(finished), "--positions", "--length", "101"]) == 2
    expected = "expected test text of at least 202 tokens, twice the length, for --positions, got 200"
    assert capsys.readouterr().err.splitlines()[-1] == f"cab eval: {expected}"
    short = make("gpt2", vocab_size=264, n_positions=40)
    monkeypatch.setattr("cab.language_run.LanguageRun.teacher_model", lambda *args: short)
    assert main(["eval", str(finished), "--positions"]) == 0
    teacher = capsys.readouterr().out.split("\n\n")[1].splitlines()[1].split()
    assert (teacher[0], teacher[3:]) == ("teacher", ["-", "-"])
    (finished / "positions.json").unlink()


def test_the_student_stands_alone_and_generates(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "cab" / "student")
    assert type(model).__name__ == "MambaForCausalLM"
    assert not any("bridge" in name for name, _ in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(finished / "cab" / "student")
    prompt = tokenizer("import ", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [list(b"import ")]
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 12)


def test_resuming_trains_what_is_missing(finished: Path) -> None:
    before = rows_of(finished)
    for file in sorted((finished / "cab").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert main(["distill", "--resume", str(finished)]) == 0
    assert rows_of(finished)["cab"]["score"] == before["cab"]["score"]
    assert rows_of(finished)["teacher"] == before["teacher"]


def test_a_run_does_not_go_on_with_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for name in "abcdef":
        (text / f"{name}.txt").write_text(f"{name} " * 100)
    assert main([*distill("arms=ce", "data.name=files", f"data.path={text}"), "--out", str(run)]) == 0
    (run / "ce" / "result.json").unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    (text / "b.txt").write_text("b " * 101)
    capsys.readouterr()
    assert main(["distill", "--resume", str(run)]) == 2
    expected = f"expected the data with which {run} began, 6 files of 1,200 bytes in {text}, got 6 files of 1,202 bytes"
    assert capsys.readouterr() == ("", f"cab distill: {expected}\n")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    (text / "b.txt").write_text("c " * 100)  # of the same size: the file is not read for this
    assert main(["distill", "--resume", str(run)]) == 0
    assert (run / "files.json").read_bytes() == before[run / "files.json"]


def test_mamba2_from_a_teacher_by_name(finished: Path, tmp_path: Path) -> None:
    """A text file, documents kept apart, and a student that starts from its teacher's weights."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * n}) + "\n" for n in range(40)))
    settings = [
        "arms=cab",
        f"teacher.name={finished / 'teacher-model'}",
        "teacher.steps=0",
        "data.name=files",
        f"data.path={tmp_path / 'text.jsonl'}",
        "data.tokenizer=bytes",
        "data.packing=padded",
        "student.name=mamba2",
        "student.head_dim=8",
        "student.groups=2",
        "student.from_teacher=true",
    ]
    assert main([*distill(*settings, preset="lm"), "--out", str(tmp_path / "run")]) == 0
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cab" / "student")).__name__ == "Mamba2ForCausalLM"
    )
    assert rows_of(tmp_path / "run")["teacher"]["seconds"] is None


def test_a_hybrid_from_a_teacher_trained_on_the_spot(tmp_path: Path) -> None:
    """It keeps attention in the second of its three blocks, aligns the others, and generates."""
    settings = ["arms=cab", "student.name=bamba", "student.depth=3", "student.attention=1", "student.head_dim=8"]
    shapes = ["student.heads=2", "student.key_heads=1", "student.from_teacher=true", "log_every=1"]
    assert main([*distill(*settings, *shapes), "--out", str(tmp_path / "run")]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cab" / "student")
    assert student.config.layers_block_type == ["linear_attention", "full_attention", "linear_attention"]
    entries = [json.loads(line) for line in (tmp_path / "run" / "cab" / "metrics.jsonl").read_text().splitlines()]
    assert [len(entry["align_layers"]) for entry in entries if "align_layers" in entry] == [2, 2]
    ids = torch.tensor([list(b"import ")])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    step_by_step = student.generate(ids, **settings)
    assert torch.equal(step_by_step, student.generate(ids, use_cache=False, **settings))
    assert step_by_step.shape == (1, 12)


@pytest.mark.skipif(not SUPPORTED, reason="needs transformers 5.24")
def test_discrete_mamba2_from_a_teacher_trained_on_the_spot(tmp_path: Path) -> None:
    settings = ["arms=soft-kd,cab", "student.name=discrete_mamba2", "student.expand=1", "student.head_dim=8"]
    shapes = ["student.groups=2", "student.d_state=8", "student.from_teacher=true"]
    assert main([*distill(*settings, *shapes), "--out", str(tmp_path / "run")]) == 0
    assert rows_of(tmp_path / "run")["cab"]["alignment"] > 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cab" / "student")
    assert type(student).__name__ == "DiscreteMamba2ForCausalLM"
    assert main(["eval", str(tmp_path / "run")]) == 0


def test_isolated_documents_from_teacher_to_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*distill("arms=cab", "data.packing=isolated"), "--out", str(tmp_path / "run")]) == 0
    assert rows_of(tmp_path / "run")["cab"]["alignment"] > 0
    make("bloom", vocab_size=264).save_pretrained(tmp_path / "bloom")
    settings = ("data.packing=isolated", "teacher.steps=0", f"teacher.name={tmp_path / 'bloom'}")
    assert main([*distill(*settings), "--out", str(tmp_path / "other")]) == 2
    expected = f"expected data.packing=concatenated or padded for {tmp_path / 'bloom'}, which does not keep"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"cab distill: {expected}")


def test_a_run_on_cached_tokens_is_the_run_on_those_in_memory(finished: Path, tmp_path: Path) -> None:
    settings = ("arms=soft-kd-a0,cab", f"data.cache={tmp_path / 'cache'}")
    assert main([*distill(*settings), "--out", str(tmp_path / "run")]) == 0
    assert [row["score"] for row in rows_of(tmp_path / "run").values()] == [
        row["score"] for row in rows_of(finished).values()
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of how torch starts its processes
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents, from files, by a process that loads them."""
    settings = ["arms=ce", "data.packing=isolated", f"data.cache={tmp_path / 'cache'}", "data.workers=1"]
    words = distill(*settings, "optim.steps=6", "save_every=2")
    training_step, taken = TaskTrainer.training_step, []

    def interrupted(self: TaskTrainer, *args: object) -> torch.Tensor:
        taken.append(self)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return training_step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(TaskTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit):
            main([*words, "--out", str(tmp_path / "interrupted")])
    assert (tmp_path / "interrupted" / "ce" / "checkpoint-2").is_dir()
    assert main(["distill", "--resume", str(tmp_path / "interrupted")]) == 0
    assert main([*words, "--out", str(tmp_path / "straight")]) == 0
    resumed, straight = (
        safetensors.torch.load_file(tmp_path / run / "ce" / "student" / "model.safetensors")
        for run in ("interrupted", "straight")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_accumulation_gives_the_gradients_of_the_large_batch(tmp_path: Path) -> None:
    """Of a step on four sequences at once, and on two after two, each sequence with as many predictions."""
    found = []
    for size, passes in ((4, 1), (2, 2)):
        settings = [
            *TINY_RUN,
            "optim.steps=1",
            f"optim.batch_size={size}",
            f"optim.accumulation={passes}",
            "optim.clip=0",
        ]
        settings.append("bridge.targets=raw")  # standardised ones follow the tokens that were seen before
        run = LanguageRun(resolve("lm-local", settings=settings), tmp_path)
        task = run.distillation_task(run.config, run.teacher_model())
        trainer = TaskTrainer(task, run.config, tmp_path / str(size), run.train, run.test)
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in task.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name, kept=gradients: kept.update({name: parameter.grad.clone()})
            )
        trainer.run()
        found.append(gradients)
    large, small = found
    assert large.keys() == small.keys()
    assert {name.split(".")[0] for name in large} == {"student", "bridges"}
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)


def test_the_loss_is_that_of_the_configuration(tmp_path: Path) -> None:
    settings = ["loss.divergence=jsd", "loss.beta=0.25", "loss.top_k=3", "loss.temperature=2", "loss.ce=0.5"]
    run = LanguageRun(resolve("lm-local", settings=[*TINY_RUN, *settings]), tmp_path)
    task = run.distillation_task(run.config, run.teacher_model())
    assert task.divergence == Divergence("jsd", 0.25, 3)
    assert task.weights == LossWeights(kd=1.0, ce=0.5, temperature=2.0)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data.name=files"], "expected data.path, a file or folder with text, got none"),
        (["data.name=files", "data.path=no"], "expected a file or folder with text, got no no"),
        (["teacher.steps=0"], "expected teacher.name, or teacher.steps to train a teacher on the text, got neither"),
        (
            ["teacher.name=/no/where", "data.tokenizer=bytes"],
            "expected teacher.name to be a causal language model by name",
        ),
        (
            ["data.tokenizer=teacher"],
            "expected data.tokenizer=bytes or a tokenizer's name without teacher.name, got 'teac",
        ),
        (["data.tokenizer=/no/where"], "expected a tokenizer by name or path, got '/no/where': "),
        (["data.length=300"], "expected test text of at least data.length=300 tokens, got 200"),
        (
            ["student.name=mamba3"],
            "expected student.name to be one of mamba, mamba2, bamba, discrete_mamba2, got ",
        ),
        (
            ["student.name=bamba", "student.head_dim=8", "student.attention=2"],
            "expected sizes of a bamba model, got: attention_blocks: expected every-K or some of the blocks from 0",
        ),
        (["student.name=mamba2", "student.head_dim=5"], "expected sizes of a mamba2 model, got: student.expand * stud"),
        (
            ["data.packing=isolated", "student.name=mamba2"],
            "expected data.packing=concatenated or padded for student.name=mamba2, got 'isolated'",
        ),
        (["teacher.quantized=4bit"], "expected teacher.name for teacher.quantized=4bit, got none"),
        (
            ["teacher.name=x", "teacher.device_map=auto"],
            "expected teacher.steps=0 for teacher.device_map=auto, got ",
        ),
        (
            ["teacher.name=x", "teacher.steps=0", "teacher.device_map=auto", "shard=true"],
            "expected shard=false for teacher.device_map=auto, got true",
        ),
        (
            ["teacher.name=x", "teacher.steps=0", "teacher.device_map=auto", "graph=true"],
            "expected graph=false for teacher.device_map=auto, got true",
        ),
        (
            ["teacher.name=x", "teacher.steps=0", "teacher.quantized=8bit", "student.from_teacher=true"],
            "expected student.from_teacher=false for teacher.quantized=8bit, got true",
        ),
        (["arms=attention"], "expected bridge.aligns=projections for a language model, got 'attention'"),
        (["data.packing=isolated", "graph=true"], "expected graph=false for data.packing=isolated, whose documents"),
        (["data.image_size=8"], "expected a known key, got 'data.image_size'"),
    ],
)
def test_what_the_user_can_put_right(
    settings: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*distill(*settings), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"cab distill: {line}")
    assert not any("Traceback" in line for line in err)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("setting", ["quantized=8bit", "quantized=4bit", "device_map=auto"])
def test_a_teacher_that_stays_where_it_is_teaches(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting.startswith("quantized"):
        pytest.importorskip("bitsandbytes")
    load, maps, quantized = AutoModelForCausalLM.from_pretrained, [], []

    def watched(*args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        maps.append(kwargs.get("device_map"))
        model, loaded = load(*args, **kwargs)
        quantized.append(getattr(model, "is_quantized", False))
        return model, loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    make("llama", vocab_size=264, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "teacher")
    settings = (f"teacher.name={tmp_path / 'teacher'}", "teacher.steps=0", f"teacher.{setting}", "data.tokenizer=bytes")
    assert main([*distill(*settings), "--out", str(tmp_path / "run")]) == 0
    assert set(maps) == {"auto" if setting == "device_map=auto" else None}
    assert set(quantized) == {setting.startswith("quantized")}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(math.isfinite(row["score"]) for row in results["rows"])


def test_bitsandbytes_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", vocab_size=264).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("cab.language_run.is_bitsandbytes_available", lambda: False)
    settings = (f"teacher.name={tmp_path / 'teacher'}", "teacher.steps=0", "teacher.quantized=4bit")
    run = LanguageRun(resolve("lm-local", settings=[*TINY_RUN, *settings, "data.tokenizer=bytes"]), tmp_path)
    with pytest.raises(
        UserError, match=r"expected the packages of cab-kernels\[quantized\] for teacher.quantized=4bit"
    ):
        run.teacher_model()


_SMALL = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_OWN_NAMES = {"vocab_size": 264, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}


@pytest.mark.parametrize(
    ("family", "sizes", "kind", "got"),
    [
        ("llama", _SMALL, AutoModel, ", a LlamaModel without lm_head.weight"),
        ("bert", _SMALL, AutoModel, ", a BertModel without cls.predictions.bias, cls.predictions.decoder.bias, ..."),
        ("distilbert", _OWN_NAMES, AutoModelForMaskedLM, " ..."),
        ("bert", _SMALL, AutoModelForMaskedLM, "got BertLMHeadModel, whose tokens see those behind them"),
    ],
    ids=["a decoder without a head", "an encoder without a head", "an encoder", "an encoder with a head"],
)
def test_a_teacher_that_is_no_causal_language_model(
    family: str, sizes: dict[str, int], kind: Any, got: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused, not taught by: transformers would make up a head with a warning, and the run would follow it."""
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(family, **{**sizes, "initializer_range": 0.5}))
    model.save_pretrained(tmp_path / "teacher")
    settings = (f"teacher.name={tmp_path / 'teacher'}", "teacher.steps=0", "data.tokenizer=bytes")
    assert main([*distill(*settings), "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match("cab distill: .*expected (teacher.name to be )?a causal language model", line)
    assert str(tmp_path / "teacher") in line
    assert line.endswith(got)
    assert len(line) < 600
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_the_teachers_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt2", vocab_size=264, n_positions=12).save_pretrained(tmp_path / "teacher")
    settings = (f"teacher.name={tmp_path / 'teacher'}", "teacher.steps=0")
    assert main([*distill(*settings), "--out", str(tmp_path / "run")]) == 2
    expected = f"expected data.length of at most 12, the positions of {tmp_path / 'teacher'}, got 16"
    assert capsys.readouterr().err.splitlines()[-1] == f"cab distill: {expected}"
    assert not (tmp_path / "run").exists()
