from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from codeindex.build import Changes, Options, build


class Repo:
    """A git repository in a temporary folder, and the folder of its pages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder / "repo", folder / "out"
        self.folder.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str | bytes) -> str:
        names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment = {
            **clean,
            **dict.fromkeys(names, "a@b"),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        done = subprocess.run(
            ["git", "-c", "protocol.file.allow=always", *arguments],
            cwd=self.folder,
            env=environment,
            check=True,
            capture_output=True,
        )
        return done.stdout.decode(errors="surrogateescape")

    def write(self, files: dict[str, str | bytes]) -> Repo:
        for path, content in files.items():
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.git("add", "-A")
        return self

    def build(self, *, check: bool = False, jobs: int = 1, **options) -> Changes:
        return build(self.folder, self.output, Options(**options), check=check, jobs=jobs)

    def page(self, name: str) -> str:
        return (self.output / name).read_text("utf-8")

    def tree(self) -> dict[str, bytes]:
        """All of the output."""
        files = (file for file in self.output.rglob("*") if file.is_file() and file.name != "lock")
        return {file.relative_to(self.output).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path)
