import json
import math
import random
import sys

import pytest
import torch
from conftest import characters, sparse_model, tiny_model

import deadband
from deadband.app import cli
from deadband.app.models import save_model
from deadband.integrations.lm_eval import FORCED, require_lm_eval, run_tasks, tasks_table


def questions(count=24):
    draw = random.Random(1)
    return [
        (
            "".join(draw.choices("abcdefgh .", k=6)),
            draw.sample(["d", "e", "a b", "f", "gh", "."], k=3),
            draw.randrange(3),
        )
        for _ in range(count)
    ]


QUESTIONS = questions()
CHOICE = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """
task: lines
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
metadata: {{version: 1.0}}
"""


@pytest.fixture
def local(tmp_path):
    """A folder with tasks of our own, which run offline."""
    pytest.importorskip("lm_eval")
    data, cache = tmp_path / "questions.jsonl", tmp_path / "cache"
    rows = [{"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in {"letters": CHOICE, "lines": ROLLING}.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data, cache=cache))
    (tmp_path / "group.yaml").write_text(
        "group: all_of_ours\ntask: [letters]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return tmp_path


def log_likelihood(model, tokenizer, text, answer):
    """Of the answer's tokens after the text, in float64."""
    ids, more = (tokenizer(each, return_tensors="pt").input_ids[0] for each in (text, answer))
    with torch.no_grad():
        logits = model(torch.cat([ids, more])[None]).logits[0].double().log_softmax(-1)
    return sum(logits[len(ids) - 1 + index, token].item() for index, token in enumerate(more))


def right_answers(model, tokenizer):
    right = []
    for text, choices, answer in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, text, choice) for choice in choices]
        right.append(float(max(range(3), key=scores.__getitem__) == answer))
    return torch.tensor(right, dtype=torch.float64)


def test_both_forms_side_by_side(local):
    model, tokenizer = sparse_model(sparsity=0.7), characters()
    before = right_answers(tiny_model("llama"), tokenizer)
    with deadband.sparse_prefill(model):
        after = right_answers(model, tokenizer)
    assert (before - after).abs().sum() > 0  # otherwise this would not tell the forms apart
    deadband.sparsity(model, reset=True)
    model.train()
    figures = run_tasks(model, tokenizer, ["letters", "lines"], include_path=local)
    assert model.training
    assert (figures["protocol"], figures["limit"]) == (FORCED, None)
    assert "forced" in FORCED
    assert figures["sparsity"] == deadband.sparsity(model).total == pytest.approx(0.7, abs=0.15)
    letters = figures["tasks"]["letters"]
    assert letters["samples"] == len(QUESTIONS)
    row, root = letters["metrics"]["acc"], math.sqrt(len(QUESTIONS))
    assert row["dense"] == pytest.approx(before.mean().item())
    assert row["sparse"] == pytest.approx(after.mean().item())
    assert row["difference"] == pytest.approx((after - before).mean().item())
    assert row["dense_error"] == pytest.approx(before.std().item() / root)
    assert row["sparse_error"] == pytest.approx(after.std().item() / root)
    assert row["difference_error"] == pytest.approx((after - before).std().item() / root)
    lines = figures["tasks"]["lines"]["metrics"]["byte_perplexity"]
    assert lines["dense"] != lines["sparse"]
    assert math.isnan(lines["difference_error"])  # no mean over documents
    text = tasks_table(figures)
    assert f"{row['sparse']:.4f} ± {row['sparse_error']:.4f}" in text
    assert "sparse prefill forced" in text
    assert [module.sparse_rows for module in model.modules() if hasattr(module, "sparse_rows")] == [4] * 14


def test_groups_and_limits(local):
    model, tokenizer = sparse_model(), characters()
    figures = run_tasks(model, tokenizer, "all_of_ours", include_path=local, limit=4)
    assert (figures["tasks"]["letters"]["samples"], figures["limit"]) == (4, 4)
    group = figures["tasks"]["all_of_ours"]
    assert group["samples"] is None
    assert group["metrics"]["acc"]["sparse"] == figures["tasks"]["letters"]["metrics"]["acc"]["sparse"]
    assert "at most 4 of each task's documents" in tasks_table(figures)
    assert tokenizer.pad_token == "<unk>"


def test_a_model_that_skips_nothing_scores_alike(local):
    model = deadband.sparsify_(tiny_model("gpt2"), exact=True)
    figures = run_tasks(model, characters(), [str(local / "letters.yaml")])  # a path instead of a name
    row = figures["tasks"]["letters"]["metrics"]["acc"]
    assert row["dense"] == row["sparse"]
    assert row["difference"] == row["difference_error"] == 0


def test_bad_tasks(local):
    model, tokenizer = sparse_model(), characters()
    with pytest.raises(ValueError, match="task 'leters' is neither .*; there are 'letters'"):
        run_tasks(model, tokenizer, ["leters"], include_path=local)
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        endless = characters()
        endless.eos_token = None
        run_tasks(model, endless, ["letters"], include_path=local)
    with pytest.raises(ValueError, match="tasks is empty"):
        run_tasks(model, tokenizer, [])
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        run_tasks(model, tokenizer, ["letters"], include_path="nowhere")
    with pytest.raises(ValueError, match="no layer of this LlamaForCausalLM is sparse"):
        run_tasks(tiny_model("llama"), tokenizer, ["letters"], include_path=local)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    with pytest.raises(ImportError, match=r'pip install "deadband\[eval\]"'):
        require_lm_eval()
    code, _, err = call(monkeypatch, "eval", "anything", "--tasks", "letters")
    assert (code, err) == (2, None)


def call(monkeypatch, *arguments, capsys=None):
    """Exit code, stdout and stderr of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["deadband", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr() if capsys is not None else None
    return code, captured and captured.out, captured and captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tokenizer = characters()
    save_model(sparse_model(), tokenizer, path / "sparse")
    save_model(tiny_model("llama"), tokenizer, path / "dense")
    (path / "text.txt").write_text("abcdefgh a.b.c. hgfedcba. " * 20)
    return path


SMALL = ("--tokens", 96, "--window", 24)


def test_eval_prints_dense_and_sparse_side_by_side(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code, out, _ = call(monkeypatch, "eval", "sparse", "--data", "text.txt", *SMALL, capsys=capsys)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["dense", "sparse", "paired", "difference"]
    assert [line.split()[0] for line in lines[1:5]] == ["perplexity", "KL", "top-1", "sparsity"]
    assert out.count("±") >= 6
    assert "protocol: all tokens sparse; 92 tokens judged in 4 windows" in out
    options = ("--protocol", "dense-prompt", "--prompt-tokens", 10, "--continue", 2, "--max-new-tokens", 6)
    code, out, _ = call(monkeypatch, "eval", "sparse", "--data", "text.txt", *SMALL, *options, capsys=capsys)
    assert code == 0
    assert "protocol: dense prompt, sparse continuation (10 dense in each window); 52 tokens judged in 4 windows" in out
    assert "protocol: prompt as in generate" in out
    assert out.count("\n  dense  '") == out.count("\n  sparse '") == 2
    code, out, _ = call(monkeypatch, "eval", "sparse", "--data", "text.txt", *SMALL, *options, "--json", capsys=capsys)
    figures = json.loads(out)
    assert figures["tokens"] == 4 * 13
    assert figures["kl_error"] > 0
    assert len(figures["per_window"]) == 4
    assert len(figures["generation"]["continuations"]) == 2
    assert figures["generation"]["continuations"][0]["tokens"] == 6
    code, out, _ = call(monkeypatch, "eval", "dense", "--data", "text.txt", *SMALL, "--json", capsys=capsys)
    assert (code, json.loads(out)["kl"]) == (0, 0)


def test_eval_of_tasks(folder, local, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ("eval", "sparse", "--tasks", "letters,lines", "--include-path", local, "--limit", 5)
    code, out, _ = call(monkeypatch, *arguments, capsys=capsys)
    assert code == 0
    assert "letters" in out
    assert "sparse prefill forced" in out
    code, out, _ = call(monkeypatch, *arguments, "--data", "text.txt", *SMALL, "--json", capsys=capsys)
    figures = json.loads(out)
    assert figures["tasks"]["tasks"]["letters"]["samples"] == 5
    assert figures["kl"] > 0
    code, _, err = call(monkeypatch, "eval", "sparse", "--tasks", "nothing", "--include-path", local, capsys=capsys)
    assert code == 2
    assert "task 'nothing' is neither" in err


BAD = {
    "nothing to judge on": ((), "give --data FILE, --tasks A,B, or both"),
    "continue without text": (("--tasks", "a", "--continue", 1), "give --data FILE too"),
    "empty tasks": (("--tasks", ","), "--tasks is empty"),
    "limit without tasks": (("--data", "text.txt", "--limit", 3), "go with --tasks"),
    "no folder": (("--tasks", "a", "--include-path", "nowhere"), "there is no folder 'nowhere'"),
    "protocol": (("--data", "text.txt", "--protocol", "some"), "protocol 'some' is not known"),
    "prompt": (("--data", "text.txt", "--prompt-tokens", 3), "goes with --protocol dense-prompt"),
    "long prompt": (
        ("--data", "text.txt", "--protocol", "dense-prompt", "--prompt-tokens", 23, *SMALL),
        "too long for a window of 24 tokens",
    ),
    "dense": (("--data", "text.txt", "--continue", 1, *SMALL), "'dense' is a dense model"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_one_clear_line(folder, monkeypatch, capsys, what):
    monkeypatch.chdir(folder)
    arguments, message = BAD[what]
    code, _, err = call(monkeypatch, "eval", "dense", *arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def by_metric(figures):
    rows = {task: row for task, each in figures["tasks"].items() for row in each["metrics"].values()}
    return {task: (row["dense"], row["sparse"]) for task, row in rows.items()}


def test_a_cache_answers_each_form_of_each_model(local):
    """Not one from the other, nor from a model of other thresholds or weights that was there before."""
    path = str(local / "answers")
    model = sparse_model(sparsity=0.7)
    others = {
        "other thresholds": sparse_model(sparsity=0.3),
        "other weights": deadband.sparsify_(tiny_model("llama", seed=5), dict(dict.fromkeys(sites(model), 0.6))),
    }
    wanted = by_metric(run_tasks(model, characters(), ["lines"], include_path=local))
    first = run_tasks(model, characters(), ["lines"], include_path=local, use_cache=path)
    again = run_tasks(model, characters(), ["lines"], include_path=local, use_cache=path)
    assert by_metric(first) == by_metric(again) == wanted
    assert wanted["lines"][0] != wanted["lines"][1]
    assert first["sparsity"] == pytest.approx(0.7, abs=0.05)
    assert math.isnan(again["sparsity"])  # nothing ran
    found = {what: run_tasks(other, characters(), ["lines"], include_path=local, use_cache=path)
             for what, other in others.items()}  # fmt: skip
    assert by_metric(found["other thresholds"])["lines"][0] == wanted["lines"][0]
    figures = {*wanted["lines"], *(value for each in found.values() for value in by_metric(each)["lines"])}
    assert len(figures) == 5  # dense of two models' weights, and three sparse ones
    assert not any(math.isnan(each["sparsity"]) for each in found.values())
    files = {each.name.split("-")[1] for each in local.glob("answers-*.db")}
    assert files == {"dense", "sparse"}
    assert len(list(local.glob("answers-dense-*.db"))) == 2  # of two models' weights
    assert len(list(local.glob("answers-sparse-*.db"))) == 3


def sites(model):
    return deadband.layers.sites.sparse_sites(model)
