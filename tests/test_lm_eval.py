"""The folder of a student in EleutherAI's harness: what it needs of it is what transformers needs."""

import json
from pathlib import Path

import pytest
import torch
from language_models import make
from torch import nn
from transformers import AutoModelForCausalLM

from cab.data.tokens import ByteTokens
from cab.students.transformers_mamba import use_cab_kernels

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [("the cat sat on the", 0), ("the dog ran on a", 1), ("a cat ran on the", 0)]
CHOICES = ["mat", "road"]
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/toy.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def log_likelihood(model: nn.Module, context: str, answer: str) -> float:
    tokens = torch.tensor(ByteTokens().encode([context + answer]))
    with torch.no_grad():
        of_tokens = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    return float(of_tokens[-len(answer) :].sum())


@pytest.mark.parametrize(
    ("family", "on_kernels"),
    [("mamba", False), ("mamba2", False), ("mamba", True)],
    ids=["mamba-folder", "mamba2-folder", "mamba-cab_kernels"],
)
def test_a_task_of_choices(family: str, on_kernels: bool, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    student = tmp_path / "student"
    make(family, vocab_size=264, eos_token_id=256, pad_token_id=256).save_pretrained(student)
    ByteTokens().save(student)
    entries = [{"question": text, "choices": CHOICES, "answer": answer} for text, answer in QUESTIONS]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "toy.yaml").write_text(TASK.format(folder=tmp_path))
    model = AutoModelForCausalLM.from_pretrained(student)
    name, arguments = "hf", {"pretrained": str(student), "dtype": "float32"}
    if on_kernels:
        name, arguments = HFLM(pretrained=use_cab_kernels(model), tokenizer=str(student), batch_size=2), None
    results = lm_eval.simple_evaluate(
        name,
        arguments,
        tasks=["toy"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    scores = [[log_likelihood(model, text, f" {choice}") for choice in CHOICES] for text, _ in QUESTIONS]
    got = [[likelihood for ((likelihood, _),) in sample["resps"]] for sample in results["samples"]["toy"]]
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    right = sum(pair[answer] == max(pair) for pair, (_, answer) in zip(scores, QUESTIONS, strict=True))
    assert results["results"]["toy"]["acc,none"] == pytest.approx(right / 3)
