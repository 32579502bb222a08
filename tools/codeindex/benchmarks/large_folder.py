"""Time, memory and truth of an index over a large folder, such as an installed package.

    python benchmarks/large_folder.py FOLDER

The folder is made a git repository in a temporary folder. Printed: seconds of a cold build, of one with nothing changed
and of one with one file changed; peak memory of all processes together; then what is checked: each class and function
that Python's `ast` finds has exactly one entry with its lines, no relative link is dead, counts equal their lists, and
two cold builds do not differ in a byte. Also for the standard library's json and asyncio.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from codeindex.markdown import Pages

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")
_LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
_COUNT = re.compile(r"^([\d,]+) entr(?:y|ies) in \[this folder\]", re.MULTILINE)


def make_repository(source: Path, folder: Path) -> None:
    """Copy the text and the headers of a folder, and add them to a new repository."""
    shutil.copytree(
        source, folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.so.*", "*.a")
    )
    for command in (["init", "-q"], ["add", "-A", "-f"]):
        subprocess.run(["git", "-C", folder, *command], check=True)


def run(folder: Path, output: Path, *options: str) -> tuple[float, float, str]:
    """Seconds and peak megabytes of a build, and what it said."""
    command = [sys.executable, "-m", "codeindex", "build", str(folder), "-o", str(output), *options]
    start = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(running, peak), daemon=True)
    watcher.start()
    said, _ = running.communicate()
    seconds = time.perf_counter() - start
    if running.returncode:
        sys.exit(f"{' '.join(command)} failed")
    watcher.join()
    return seconds, peak[0] / 1e6, said.strip()


def _watch(running: subprocess.Popen, peak: list[int]) -> None:
    """Memory of a process and its children, pages that they share counted once."""
    while running.poll() is None:
        peak[0] = max(peak[0], sum(_memory(pid) for pid in _tree(running.pid)))
        time.sleep(0.05)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(inner for child in children for inner in _tree(int(child)))]


def _memory(pid: int) -> int:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1000 if found else 0


def wrong_entries(folder: Path, output: Path) -> tuple[int, int]:
    """How many classes and functions `ast` finds in Python files with a page, and how many lack exactly one entry."""
    entries: Counter[tuple[str, str, int, int]] = Counter()
    with open(output / ".codeindex" / "names.txt", encoding="utf-8") as lines:
        for line in lines:
            simple, _, kind, path, start, end, _ = line.split("\t")
            if kind != "variable":
                entries[path, simple, int(start), int(end)] += 1
    expected: Counter[tuple[str, str, int, int]] = Counter()
    unread = set()
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
    pages = Pages(files)
    for path, file in files.items():
        if not (output / pages.of(path)).exists():  # generated
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # for another version of Python
            unread.add(path)
            continue
        expected.update(
            (path, node.name, node.lineno, node.end_lineno or 0)
            for node in ast.walk(tree)
            if isinstance(node, _DEFINITIONS)
        )
    mine = Counter({key: count for key, count in entries.items() if key[0].endswith(".py") and key[0] not in unread})
    return expected.total(), ((expected - mine) + (mine - expected)).total()


def dead_links(output: Path) -> tuple[int, list[str]]:
    """How many relative links there are in all pages, and those that lead to nothing."""
    exists: dict[str, bool] = {}
    total, dead = 0, []
    for page in output.rglob("*.md"):
        folder = str(page.parent)
        for target in _LINK.findall(_CODE.sub("", page.read_text("utf-8"))):
            path = os.path.normpath(os.path.join(folder, unquote(target.split("#")[0], errors="surrogateescape")))
            if path not in exists:
                exists[path] = os.path.lexists(path)
            total += 1
            if not exists[path]:
                dead.append(f"{page}: {target}")
    return total, dead


def wrong_counts(output: Path) -> int:
    """Keyword indexes whose count differs from their list."""
    wrong = 0
    for page in output.rglob("keywords.md"):
        parts = list(page.parent.glob("keywords-*.md")) or [page]
        listed = sum(sum(line.startswith("* [") for line in part.read_text("utf-8").splitlines()) for part in parts)
        said = _COUNT.search(page.read_text("utf-8"))
        wrong += said is None or int(said[1].replace(",", "")) != listed
    return wrong


def differences(first: Path, second: Path) -> int:
    """Files that are in one of two outputs only, or differ."""
    names = [
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != "lock"}
        for folder in (first, second)
    ]
    common = names[0] & names[1]
    return len(names[0] ^ names[1]) + sum(
        (first / name).read_bytes() != (second / name).read_bytes() for name in common
    )


def measure(name: str, source: Path, *options: str) -> None:
    """All figures of one folder."""
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place, "repo"), Path(place, "out")
        make_repository(source, folder)
        seconds, memory, said = run(folder, output, *options)
        print(f"{name}{' '.join(('', *options))}: {said}")
        print(f"  cold {seconds:.1f} s, {memory:,.0f} MB", end="", flush=True)
        seconds, memory, _ = run(folder, output, *options)
        print(f"; nothing changed {seconds:.1f} s, {memory:,.0f} MB", end="", flush=True)
        changed = min(folder.rglob("*.py"))
        changed.write_text(changed.read_text() + "\n\ndef one_more(): ...\n")
        seconds, memory, said = run(folder, output, *options)
        print(f"; one file changed {seconds:.1f} s, {memory:,.0f} MB ({said.split(': ')[-1]})", flush=True)
        total, wrong = wrong_entries(folder, output)
        print(f"  {total:,} classes and functions, {wrong} without exactly one entry", flush=True)
        total, dead = dead_links(output)
        print(f"  {total:,} relative links, {len(dead)} dead {dead[:3] if dead else ''}", flush=True)
        print(f"  {wrong_counts(output)} keyword indexes whose count differs from their list", flush=True)
        again = Path(place, "again")
        run(folder, again, *options)
        shutil.rmtree(output)
        run(folder, output, *options)
        print(f"  two cold builds: {differences(output, again)} differences", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a large folder; without it, json and asyncio only")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores")
    for package in (json, asyncio):
        measure(package.__name__, Path(str(package.__file__)).parent)
    if arguments.folder is not None:
        measure(arguments.folder.name, arguments.folder, "--generated")
        measure(arguments.folder.name, arguments.folder)


if __name__ == "__main__":
    main()
