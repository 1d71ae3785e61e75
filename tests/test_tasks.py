"""Benchmarks by lm_eval: our adapter gives the results of lm_eval's own transformers model on the exported weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_model
from test_hellaswag import SINGLE, write_examples

import evaluate
from evaluate import Config
from minigpt import likelihood
from minigpt.cli import UserError
from minigpt.pretrained import load_pretrained

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-extra.txt")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from minigpt.tasks import HarnessModel

TASK = """\
task: ships
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}, cache_dir: CACHE}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{ctx}}"
doc_to_target: "{{label | int}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def task_folder(tmp_path) -> Path:
    """Return a folder with the task "ships", on HellaSwag-like examples in validation.jsonl, and the group "fleet"."""
    file = write_examples(tmp_path / "validation.jsonl")
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("FILE", str(file)).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks" / "ships.yaml").write_text(task)
    (tmp_path / "tasks" / "fleet.yaml").write_text("group: fleet\ntask: [ships]\n")
    return tmp_path / "tasks"


def make_requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_results_equal_lm_evals_hf_model(gpt2_tokenizer, run_script, tmp_path):
    """Log-likelihoods, those of whole texts, and generated texts, also without context and beyond the model's."""
    source = make_model(tmp_path / "run", gpt2_tokenizer, chat=False)
    run_script("export.py", "--checkpoint", source, "--out", "exported")
    theirs = HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=3)
    theirs.model.generation_config.max_new_tokens = None  # lm_eval sets max_length
    ours = HarnessModel(load_pretrained(str(source)), SINGLE)
    long = " ".join(f"Ship {i} leaves the harbour." for i in range(40))
    assert len(gpt2_tokenizer.encode(long)) > 3 * ours.block_size

    pairs = [("The sea", " is deep"), ("", "Hello there"), (long, " and returns"), ("The sea ", "is")]
    pairs.append(("A", long[:150]))
    # Greedy decoding would generate this one.
    likely = ours.generate_until(make_requests("generate_until", ("The sea", {"until": [], "max_gen_toks": 3})))[0]
    pairs.append(("The sea", likely))
    requests = make_requests("loglikelihood", *pairs)
    expected, results = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected] == [False] * 5 + [True]
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], rel=1e-5)

    requests = make_requests("loglikelihood_rolling", ("The sea is deep.",), (long,), (long[:300],))
    expected, results = theirs.loglikelihood_rolling(requests), ours.loglikelihood_rolling(requests)
    assert results == pytest.approx(expected, rel=1e-5)

    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    whole = ours.generate_until(make_requests("generate_until", ("The sea", options)))[0]
    prompts = [("The sea", options), (long, options), ("The sea", options | {"until": [whole[5:9]]})]
    requests = make_requests("generate_until", *prompts)
    expected = theirs.generate_until(requests)
    assert ours.generate_until(requests) == expected
    assert expected[0] == whole and expected[2] == whole[:5]


def test_limits_of_requests(chatterbox):
    """Repeats of a sampled request differ; a request that does not fit the context is an error."""
    model = HarnessModel(load_pretrained(str(chatterbox)), SINGLE)
    options = {"until": [], "max_new_tokens": 8, "temperature": 1.0, "top_k": 0}
    texts = model.generate_until(make_requests("generate_until", *[("The sea", options)] * 3))
    assert len(set(texts)) == 3 and {len(text) for text in texts} == {8}
    with pytest.raises(UserError, match="generates up to 2048 tokens; the model's context is 2048: lower max_gen_toks"):
        model.generate_until(make_requests("generate_until", ("The sea", {"until": [], "max_gen_toks": 2048})))
    for continuation in ("", "a" * 2049):
        with pytest.raises(UserError, match=r"has a continuation of .* tokens; the model's context is 2048"):
            model.loglikelihood(make_requests("loglikelihood", ("The sea", continuation)))
    [(space, _)] = model.loglikelihood(make_requests("loglikelihood", ("  ", "a")))
    [(text, _)] = model.loglikelihood(make_requests("loglikelihood", ("", "  a")))
    assert space == text  # both begin at the end-of-text token


def test_batches_have_a_maximum_size(monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 20)
    assert likelihood.build_batches([3, 30, 5, 10, 9, 4, 1]) == [[1], [3, 4], [2, 5, 0, 6]]
    assert likelihood.build_batches([]) == []


def test_evaluate_runs_a_task(pretrained, task_folder, run_script, tmp_path, capsys):
    """The accuracies are those of our own HellaSwag on the same texts, for any number of processes."""
    config = Config(str(pretrained), data=(), json=tmp_path / "figures.jsonl")
    evaluate.main(replace(config, hellaswag_files=(str(tmp_path / "validation.jsonl"),)))
    assert "HellaSwag" in capsys.readouterr().out
    evaluate.main(replace(config, tasks=("ships",), task_folder=task_folder))
    printed = capsys.readouterr().out
    flags = ("--checkpoint", pretrained, "--data", "--tasks", "ships", "--task_folder", task_folder)
    run_script("evaluate.py", *flags, "--json", "figures.jsonl", processes=2)
    hellaswag, one, two = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    result = one["tasks"]["ships"]
    assert two["tasks"]["ships"] == result
    for name, ours in {"acc": "hellaswag", "acc_norm": "hellaswag_norm_chars"}.items():
        assert result[name] == pytest.approx(hellaswag[ours])
        assert result[f"{name}_stderr"] == pytest.approx(hellaswag[f"{ours}_stderr"])
        assert f"{name:<20} {result[name]:>10.4f} {result[f'{name}_stderr']:>16.4f}" in printed
    assert "HellaSwag" not in printed


def test_max_examples_limits_each_task_of_a_group(pretrained, task_folder, tmp_path):
    config = Config(str(pretrained), data=(), tasks=("fleet",), task_folder=task_folder, max_examples=10)
    evaluate.main(replace(config, json=tmp_path / "figures.jsonl", quantize="int8"))
    result = json.loads((tmp_path / "figures.jsonl").read_text())["tasks"]["ships"]
    assert 0 < result["acc"] < 1
    assert result["acc_stderr"] == pytest.approx((result["acc"] * (1 - result["acc"]) / 9) ** 0.5)


def test_published_figures_stand_beside_ours():
    sciq = {"acc": 0.7, "acc_stderr": 0.1, "acc_norm": 0.5, "acc_norm_stderr": 0.2}
    table = evaluate.format_tasks({"sciq": sciq, "x": {"y": 3.0}})
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows[0] == ["sciq", "acc", "0.7000", "0.1000"]
    assert rows[1:] == [["sciq", "acc_norm", "0.5000", "0.2000", "0.644"], ["x", "y", "3.0000"]]


def test_mistakes_are_explained(pretrained, task_folder, tmp_path):
    def error(*tasks: str, **flags) -> str:
        with pytest.raises(UserError) as raised:
            evaluate.main(Config(str(pretrained), data=(), tasks=tasks, **flags))
        return str(raised.value)

    assert error("boats", task_folder=task_folder) == f"--tasks boats: no such task; {task_folder} has fleet, ships"
    assert "Duplicate task 'ships'" in error("fleet", "ships", task_folder=task_folder)
    assert "no such folder" in error("ships", task_folder=tmp_path / "none")
    assert "--task_folder needs --tasks" in error(task_folder=task_folder)
    assert "cannot be combined" in error("ships", hellaswag_files=("x.jsonl",))
    (tmp_path / "validation.jsonl").unlink()
    assert error("ships", task_folder=task_folder).startswith("--tasks: Unable to find")
    (task_folder / "ships.yaml").write_text("task: ships\ndataset_path: [")
    assert error("ships", task_folder=task_folder).startswith("--tasks ships: no such task")
