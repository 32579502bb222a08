import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from deadband.app import cli
from deadband.layers.formats import DEFAULT_INT4
from deadband.ops import products
from deadband.running import forward

TEXT = "the deadband is the range of input that a control system treats as zero. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of single characters, in a folder whose name has a space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("with space")
    vocabulary = {"<unk>": 0} | {character: index + 1 for index, character in enumerate(sorted(set(TEXT)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path / "dense")
    tiny_model("llama").save_pretrained(path / "dense")
    (path / "text.txt").write_text(TEXT)
    (path / "empty.txt").write_text("")
    return path


@pytest.fixture
def deadband(monkeypatch, capsys, folder):
    """Call the command line in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["deadband", *map(str, arguments)])
        monkeypatch.setattr(forward, "_progress", {"seen": float("-inf"), "said": 0.0})  # a process of its own has that
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL = ("--tokens", 256, "--window", 32)


@pytest.fixture
def calibrated(deadband, folder):
    path = folder / "calibration.safetensors"
    if not path.exists():
        assert deadband("calibrate", "dense", "--data", "text.txt", "-o", path, *SMALL)[0] == 0
    return path


@pytest.fixture
def sparse(deadband, folder, calibrated):
    path = folder / "sparse"
    if not path.exists():
        code, out, _ = deadband(
            "sparsify", "dense", calibrated, "--sparsity", 0.4, "--data", "text.txt", "-o", path, *SMALL
        )
        assert code == 0
        assert "40% of the weight bytes over 14 sites" in out
        assert "corrected on the sparse model" in out
        assert "auto: " in out  # what was picked, and why
    return path


def test_the_whole_flow(deadband, sparse):
    code, out, _ = deadband("generate", sparse, "the deadband", "--max-new-tokens", 5)
    assert code == 0
    assert out.startswith("t h e" if " h " in out else "the deadband")
    code, out, _ = deadband("eval", sparse, "--data", "text.txt", *SMALL, "--json")
    figures = json.loads(out)
    assert figures["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert figures["kl"] > 0
    assert figures["tokens"] == 8 * 31
    code, out, _ = deadband("bench", sparse, "--tokens", 3, "--json")
    figures = json.loads(out)
    assert set(figures["models"]) == {"dense", "sparse"}
    assert figures["models"]["sparse"]["bytes_per_token"] < figures["models"]["dense"]["bytes_per_token"]
    assert code == 0


def test_json_of_every_command(deadband, folder, calibrated):
    _, out, _ = deadband("calibrate", "dense", "--data", "text.txt", "-o", "again.safetensors", "--json", *SMALL)
    assert len(json.loads(out)["sites"]) == 14
    arguments = ("sparsify", "dense", calibrated, "--sparsity", 0.25, "-o", "plain", "--json")
    figures = json.loads(deadband(*arguments)[1])
    assert (figures["corrected"], len(figures["thresholds"])) == (False, 14)
    assert json.loads(deadband("info", "--json")[1])["torch"] == torch.__version__
    assert json.loads(deadband("generate", "plain", "a", "--max-new-tokens", 3, "--json")[1])["new_tokens"] == 3


def test_sites_that_the_text_never_reaches(deadband, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder")
             for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = AutoConfig.for_model(
        "bart", vocab_size=64, d_model=32, max_position_embeddings=40, **sizes, eos_token_id=None
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "bart")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "bart" / name).write_bytes((folder / "dense" / name).read_bytes())
    arguments = ("calibrate", "bart", "--data", "text.txt", "-o", "bart.safetensors", *SMALL, "--json")
    code, _, err = deadband(*arguments)
    assert code == 2
    assert "8 sites were never reached" in err
    assert "unreached='dense'" in err
    assert not (folder / "bart.safetensors").exists()
    code, out, _ = deadband(*arguments, "--unreached", "dense")
    assert code == 0
    assert len(json.loads(out)["unreached"]) == 8
    assert deadband("inspect", "bart", "--data", "text.txt", *SMALL, "--unreached", "dense")[0] == 0
    for command in ("calibrate", "inspect", "eval"):
        output = ("-o", "long.safetensors") if command == "calibrate" else ()
        code, _, err = deadband(command, "bart", "--data", "text.txt", "--tokens", 256, "--window", 64, *output)
        assert code == 2
        assert (
            "64 tokens are more than the 40 positions of this BartForCausalLM; give windows of at most 40 tokens" in err
        )


def test_greedy_and_sites(deadband, folder, calibrated):
    code, out, _ = deadband(
        "calibrate", "dense", "--data", "text.txt", "-o", "mlp.safetensors", "--include", "*.mlp.*", *SMALL
    )
    assert code == 0
    assert "Calibration of 6 sites" in out
    code, out, _ = deadband(
        "sparsify", "dense", "mlp.safetensors", "--sparsity", 0.3, "--method", "greedy", "--data", "text.txt",
        "-o", "greedy", *SMALL,
    )  # fmt: skip
    assert code == 0
    assert "over 6 sites, greedy" in out


def test_a_budget_is_found_for_a_quality(deadband, folder, calibrated):
    quality = ("sparsify", "dense", calibrated, "--data", "text.txt", "-o", "found", "--json", *SMALL)
    code, out, _ = deadband(*quality, "--max-kl", 0.05)
    figures = json.loads(out)
    assert code == 0
    assert 0.02 <= figures["sparsity"] < 0.95
    assert "max_kl=0.05" in figures["reason"]
    code, out, _ = deadband("eval", "found", "--data", "text.txt", *SMALL, "--json")
    assert json.loads(out)["kl"] < 0.1


def test_quantised_weights(deadband, folder, calibrated):
    arguments = ("sparsify", "dense", calibrated, "--sparsity", 0.4)
    code, out, err = deadband(*arguments, "--weights", "int4", "-o", "int4")
    assert code == 0
    assert f"weights: {DEFAULT_INT4} (14), int8-g32 (1); 0.3 MB became 0.1 MB" in out
    assert "Warning" not in err
    code, out, _ = deadband(*arguments, "--weights", "int8", "--output-weights", "int4-g64-zp", "-o", "int8", "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["weights"]["lm_head"] == "int4-g64-zp"
    assert set(figures["weights"].values()) == {"int8", "int4-g64-zp"}
    assert figures["bytes"] < 0.3 * figures["dense_bytes"]
    code, out, _ = deadband(*arguments, "--weights", "int4", "--gptq", "--data", "text.txt", "-o", "gptq", *SMALL)
    assert code == 0
    one, other = (load_file(folder / name / "deadband.safetensors") for name in ("int4", "gptq"))
    assert not torch.equal(one["model.layers.0.mlp.down_proj.codes"], other["model.layers.0.mlp.down_proj.codes"])
    assert deadband("generate", "gptq", "the deadband", "--max-new-tokens", 3)[0] == 0
    code, out, err = deadband("bench", "int4", "--tokens", 3, "--json")
    rows = json.loads(out)["models"]
    assert (code, "dequantised" in err) == (0, False)
    assert rows["sparse"]["bytes_per_token"] < 0.3 * rows["dense"]["bytes_per_token"]


def test_weights_of_a_gguf_file(deadband, folder, calibrated):
    gguf = pytest.importorskip("gguf")
    from deadband.quantization.gguf_weights import quantized_weights

    model = tiny_model("llama")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in (
        ("token_embd", model.lm_head.weight),
        ("blk.0.ffn_up", model.model.layers[0].mlp.up_proj.weight),
    ):
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight.detach().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arguments = ("sparsify", "dense", calibrated, "--sparsity", 0.4, "--gguf", "model.gguf", "--json")
    code, out, _ = deadband(*arguments, "-o", "file")
    assert code == 0
    assert json.loads(out)["weights"] == {"model.layers.0.mlp.up_proj": "int8-g32", "lm_head": "int8-g32"}
    code, out, _ = deadband(*arguments, "--weights", "int4", "-o", "mixed")
    formats = json.loads(out)["weights"]
    assert [formats.pop(name) for name in ("model.layers.0.mlp.up_proj", "lm_head")] == ["int8-g32"] * 2
    assert (len(formats), set(formats.values())) == (13, {DEFAULT_INT4})
    stored = load_file(folder / "mixed" / "deadband.safetensors")
    given = quantized_weights(folder / "model.gguf")
    assert torch.equal(stored["lm_head.codes"], given["model.embed_tokens"].codes)
    assert torch.equal(stored["model.layers.0.mlp.up_proj.scales"], given["model.layers.0.mlp.up_proj"].scales)
    code, out, _ = deadband(*arguments, "--weights", "int4", "--output-weights", "int8", "-o", "output")
    assert json.loads(out)["weights"]["lm_head"] == "int8"
    other = deadband("sparsify", "dense", calibrated, "--sparsity", 0.4, "--gguf", "text.txt", "-o", "x")
    assert other[0] == 2
    assert "cannot be read as a GGUF file" in other[2]


def test_an_unknown_format_lists_the_known_ones(deadband, calibrated):
    _, _, err = deadband("sparsify", "dense", calibrated, "--sparsity", 0.4, "--weights", "int3", "-o", "x")
    assert "'int3' is not known; expected int4" in err
    assert "int4-g64-zp" in err


BAD = {
    "no such model": ("eval", "./missing", "--data", "text.txt"),
    "no such model on the hub": ("eval", "missing-model", "--data", "text.txt"),
    "no text": ("eval", "dense", "--data", "missing.txt"),
    "empty text": ("calibrate", "dense", "--data", "empty.txt", "-o", "x"),
    "short text": ("eval", "dense", "--data", "text.txt", "--window", 100000),
    "sparsity": ("sparsify", "dense", "calibration.safetensors", "--sparsity", 1.5, "-o", "x"),
    "method": ("sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--method", "best", "-o", "x"),
    "greedy without data": (
        "sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--method", "greedy", "-o", "x",
    ),
    "no budget": ("sparsify", "dense", "calibration.safetensors", "-o", "x"),
    "two budgets": ("sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--max-kl", 0.1, "-o", "x"),
    "quality without data": ("sparsify", "dense", "calibration.safetensors", "--max-kl", 0.1, "-o", "x"),
    "impossible quality": (
        "sparsify", "dense", "calibration.safetensors", "--max-kl", -1, "--data", "text.txt", "-o", "x",
    ),
    "not a calibration": ("sparsify", "dense", "text.txt", "--sparsity", 0.5, "-o", "x"),
    "no calibration": ("sparsify", "dense", "missing", "--sparsity", 0.5, "-o", "x"),
    "other model": ("sparsify", "other", "calibration.safetensors", "--sparsity", 0.5, "-o", "x"),
    "weights": ("sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--weights", "int3", "-o", "x"),
    "output weights": (
        "sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--output-weights", "q8", "-o", "x",
    ),
    "gptq without data": (
        "sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--weights", "int4", "--gptq", "-o", "x",
    ),
    "gptq without weights": (
        "sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--data", "text.txt", "--gptq", "-o", "x",
    ),
    "no gguf": ("sparsify", "dense", "calibration.safetensors", "--sparsity", 0.5, "--gguf", "missing", "-o", "x"),
    "output exists": ("calibrate", "dense", "--data", "text.txt", "-o", "dense"),
    "output nowhere": ("calibrate", "dense", "--data", "text.txt", "-o", "missing/x"),
    "pattern": ("calibrate", "dense", "--data", "text.txt", "-o", "x", "--include", "nothing"),
    "criterion": ("calibrate", "dense", "--data", "text.txt", "-o", "x", "--criterion", "size"),
    "dtype": ("eval", "dense", "--data", "text.txt", "--dtype", "int3"),
    "empty prompt": ("generate", "dense", ""),
    "demo into a folder of something else": ("demo", "-o", "dense"),
    "missing argument": ("eval",),
    "unknown option": ("info", "--nonsense"),
    "not a number": ("bench", "dense", "--tokens", "many"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(deadband, folder, calibrated, what):
    if what == "other model" and not (folder / "other").exists():
        from shutil import copytree

        copytree(folder / "dense", folder / "other")
        tiny_model("gpt2").save_pretrained(folder / "other")
    before = sorted(os.listdir(folder))
    code, out, err = deadband(*BAD[what])
    assert code == 2
    assert "Traceback" not in out + err
    if not err.startswith("Usage:"):
        assert err.startswith("deadband: error: ")
        assert len(err.strip().splitlines()) == 1
    assert sorted(os.listdir(folder)) == before


def test_an_unwritable_folder_is_an_error_before_the_work(deadband, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root can write everywhere
    code, _, err = deadband("calibrate", "dense", "--data", "text.txt", "-o", "x")
    assert code == 2
    assert "cannot be written" in err


def test_a_full_disk_leaves_nothing(deadband, folder, calibrated, monkeypatch):
    import safetensors.numpy

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    code, _, err = deadband("calibrate", "dense", "--data", "text.txt", "-o", "x", *SMALL)
    assert code == 2
    assert err.strip() == "deadband: error: No space left on device"
    assert not [name for name in os.listdir(folder) if name.startswith((".x", "x"))]


def test_overwriting(deadband, folder, calibrated):
    (folder / "taken").write_text("precious")
    arguments = ("calibrate", "dense", "--data", "text.txt", "-o", "taken", *SMALL)
    assert deadband(*arguments)[0] == 2
    assert (folder / "taken").read_text() == "precious"
    assert deadband(*arguments, "--overwrite")[0] == 0
    (folder / "thesis").mkdir(exist_ok=True)
    (folder / "thesis" / "thesis.tex").write_text("precious")
    assert deadband("calibrate", "dense", "--data", "text.txt", "-o", "thesis", "--overwrite", *SMALL)[0] == 2
    assert deadband("sparsify", "dense", calibrated, "--sparsity", 0.4, "-o", "thesis", "--overwrite")[0] == 2
    assert (folder / "thesis" / "thesis.tex").read_text() == "precious"


def test_info_without_kernels_says_so():
    environment = {**os.environ, "DEADBAND_KERNELS": "0"}
    command = [sys.executable, "-m", "deadband.app.cli", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "no C++ compiler was found at install, or DEADBAND_KERNELS=0 is set" in result.stdout


def test_products_in_another_dtype_are_told_of(deadband, monkeypatch):
    monkeypatch.setattr(products, "slow_by", lambda dtype: 4.0)
    arguments = ("inspect", "dense", "--data", "text.txt", *SMALL)
    assert deadband(*arguments)[2] == ""
    told = "deadband: products of many tokens are made in float32: torch's own in bfloat16 take 4.0 times as long\n"
    assert deadband(*arguments, "--dtype", "bfloat16")[2] == told
    assert deadband("eval", "dense", "--data", "text.txt", "--dtype", "bfloat16", *SMALL)[2] == told
    assert "bfloat16 4.0, float16 4.0" in deadband("info")[1]
    assert json.loads(deadband("info", "--json")[1])["slow_by"] == {"bfloat16": 4.0, "float16": 4.0}


def test_progress_without_a_terminal_is_lines(deadband, folder, monkeypatch):
    monkeypatch.setattr(forward, "LINE_EVERY", 0.0)
    code, out, err = deadband("calibrate", "dense", "--data", "text.txt", "-o", "lines", "--json", *SMALL)
    assert code == 0
    assert json.loads(out)["tokens"] == 256
    assert "calibrate: 7 of 8, 0 s\n" in err


@pytest.mark.parametrize("seconds", [1.5, 2.5])
def test_ctrl_c_leaves_nothing(folder, seconds):
    """While importing, loading or calibrating."""
    command = [sys.executable, "-m", "deadband.app.cli", "calibrate", "dense", "--data", "text.txt", "-o", "stopped"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:  # it had ended before
        return
    assert process.returncode in (130, -signal.SIGINT)  # the latter before the handler is there, or after it is gone
    assert process.returncode != 130 or "interrupted; nothing was left half written" in err
    assert not [name for name in os.listdir(folder) if "stopped" in name]


def test_an_interrupt_that_a_library_turns_into_another_error(monkeypatch, capsys):
    def app():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException as error:
            raise ModuleNotFoundError("could not import") from error

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "app", app)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def run(folder, *arguments, **environment):
    """The command line in a process of its own, its output as bytes."""
    command = [sys.executable, "-m", "deadband.app.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True)


@pytest.fixture(scope="module")
def foreign(folder):
    """The tiny model with letters in its vocabulary that not every terminal shows, in a folder with quotes."""
    path = folder / 'it\'s "quoted"'
    shutil.copytree(folder / "dense", path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"<unk>": 0} | {chr(0x4E00 + index): index for index in range(1, 60)}
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "text.txt").write_text("\ufeff" + "".join(chr(0x4E01 + index % 50) for index in range(600)), "utf-8")
    return path


ENCODINGS = [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}]


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda each: "-".join(each.values()))
def test_what_a_terminal_cannot_show_is_escaped(folder, foreign, environment):
    done = run(folder, "generate", foreign.name, "\u4e01\u4e02", "--max-new-tokens", 3, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"\u4e01 \u4e02"), done.stdout
    done = run(folder, "eval", foreign.name, "--data", "caf\u00e9 \u4e01.txt", **environment)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"deadband: error: there is no text file"), done.stderr


def test_json_is_json_in_any_terminal(folder, foreign):
    done = run(folder, "generate", foreign.name, "\u4e01", "--max-new-tokens", 1, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["text"].startswith("\u4e01")


def test_a_reader_that_goes_away_is_a_quiet_end(folder):
    command = [sys.executable, "-m", "deadband.app.cli", "info"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=folder, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_paths_with_quotes_and_a_text_with_a_mark(deadband, foreign):
    data = foreign / "text.txt"
    calibration, sparse = foreign / "its calibration", foreign / 'the "sparse" one'
    assert deadband("calibrate", foreign, "--data", data, "-o", calibration, *SMALL)[::2] == (0, "")
    assert deadband("sparsify", foreign, calibration, "--sparsity", 0.4, "-o", sparse)[0] == 0
    assert deadband("inspect", foreign, "--data", data, *SMALL)[0] == 0
    assert deadband("eval", sparse, "--data", data, *SMALL)[0] == 0
    assert deadband("bench", sparse, "--tokens", 2, "--no-compile", "--no-break-even")[0] == 0
    code, _, err = deadband("eval", sparse, "--data", foreign)
    assert (code, "is a folder; expected a text file" in err) == (2, True)


def test_a_prompt_that_is_no_text():
    assert cli.argument_text("the prompt", os.fsencode("\u4e01").decode("ascii", "surrogateescape")) == "\u4e01"
    for bad in ("a\udcff", "a\ud800"):
        with pytest.raises(ValueError, match="the prompt is not UTF-8 text"):
            cli.argument_text("the prompt", bad)


@pytest.mark.slow
def test_generate_says_what_the_graph_decoded(folder, sparse):
    done = run(folder, "generate", sparse, "the", "--compile", "--max-new-tokens", 6, "--json")
    assert done.stderr == b""
    assert json.loads(done.stdout)["decoding"] == {"graph": 5, "model": {}, "problem": None}
