"""docs/figures.md and the marked tables of the README are what benchmarks/figures.py makes of the tracked results."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say(figures):
    written = (ROOT / "docs" / "figures.md").read_text("utf-8")
    assert written == figures.page(figures.load()), "run `make figures`"


def test_the_tables_of_the_readme_are_what_the_results_say(figures):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme.count("<!-- figures: ") == readme.count("<!-- /figures -->") == 2
    assert readme == figures.marked(readme, figures.load()), "run `make figures`"
    assert len(readme.encode()) < 9000


def test_every_result_has_a_place_on_the_page(figures):
    page = figures.page(figures.load())
    for folder in figures.RESULTS.iterdir():
        for path in folder.glob("*.json"):
            others = figures.load()
            del others[folder.name][path.stem]
            assert figures.page(others) != page, f"{path.name} is shown nowhere"


def test_a_second_machine_adds_a_section(figures, tmp_path):
    result = json.loads(next(figures.RESULTS.glob("*/kernels.json")).read_text("utf-8"))
    for name, processor in (("one", "One"), ("two", "Two")):
        (tmp_path / name).mkdir()
        about = {**result, "machine": {**result["machine"], "processor": processor, "kernels": "x86-64-v3"}}
        (tmp_path / name / "kernels.json").write_text(json.dumps(about), "utf-8")
    page = figures.page(figures.load(tmp_path))
    assert page.count("\n### ") == 2
    assert "### One, 2 cores, kernels x86-64-v3, torch 2.13.0, transformers 5.23.0, 1 / 2 threads\n" in page


def test_what_was_not_measured_is_a_dash(figures):
    """llama.cpp may be missing: then what stands beside it is null in the JSON."""
    result = json.loads(next(figures.RESULTS.glob("*/decode-llama-1b.json")).read_text("utf-8"))
    rows = [row for row in copy.deepcopy(result["rows"]) if not row["decoder"].startswith("llama.cpp")]
    for row in rows:
        row["against_llama_cpp"] = None
    table = figures.decode({**result, "rows": rows})
    assert "llama.cpp Q8_0" not in table
    assert table.count("| – / – |") == len({row["decoder"] for row in rows})


def test_the_script_loads_neither_torch_nor_matplotlib(figures):
    code = "import figures, sys; print({'torch', 'matplotlib'} & {*sys.modules})"
    here = figures.RESULTS.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=True)
    assert done.stdout.strip() == "set()"


def test_the_table_beside_llama_cpp_has_a_column_for_each_machine(figures):
    results = figures.load()
    slug, scripts = next(each for each in results.items() if "decode-llama-1b" in each[1])
    result = copy.deepcopy(scripts["decode-llama-1b"])
    result["machine"] |= {"kernels": "x86-64-v3", "kept_to": "x86-64-v3"}
    text = "<!-- figures: decode-llama-1b -->\n<!-- /figures -->"
    one = {slug: {"decode-llama-1b": {**result, "machine": {**result["machine"], "kept_to": None}}}}
    more = {**one, "other": {"decode-llama-1b": result}}
    before, after = figures.marked(text, one), figures.marked(text, more)
    assert "kept to x86-64-v3" not in before
    assert after.count("kept to x86-64-v3") == 1
    assert after.count(" | ") > before.count(" | ")
    page = figures.page({"other": {"decode-llama-1b": result}})
    assert "all kept to x86-64-v3, torch" in page
