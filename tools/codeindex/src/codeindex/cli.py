"""The command line: build, check, where."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from codeindex import __version__
from codeindex.build import Changes, Options, build
from codeindex.markdown import NO_LINKS, count
from codeindex.repository import RepositoryError
from codeindex.store import OutputError
from codeindex.where import where

DEFAULT_OUTPUT = Path("docs/code")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="codeindex", description="A page and a keyword index for every file of a repository."
    )
    made.add_argument("--version", action="version", version=f"codeindex {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in (
        ("build", "write the pages"),
        ("check", "exit with 1 if the pages are not what build would write"),
    ):
        command = commands.add_parser(name, help=about, description=about.capitalize() + ".")
        command.add_argument("repository", type=Path, metavar="REPO", help="a folder in a git repository")
        _output(command)
        command.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="PATTERN",
            help="leave out files that a git pathspec pattern matches, such as 'third_party/**'; repeatable",
        )
        command.add_argument(
            "--generated",
            action="store_true",
            help="pages for generated files too: linguist-generated in .gitattributes, or said at their top",
        )
        command.add_argument(
            "--source-url",
            default="",
            metavar="URL",
            help="link to sources there, with {path} for the file's path, instead of relatively; 'none' for no links",
        )
        command.add_argument("--title", default="Code index", help="of the first page (%(default)s)")
        command.add_argument(
            "--jobs", type=int, default=0, metavar="N", help="processes; one for each core, unless given"
        )
        command.add_argument("--quiet", action="store_true", help="show no progress bar")
    command = commands.add_parser(
        "where",
        help="show where a name is defined and who uses it",
        description="Show every definition of a name and the files that use it, from the index alone.",
    )
    command.add_argument("name", metavar="NAME", help="a name, or its end: method, Class.method")
    _output(command)
    return made


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="OUT",
        help=f"the folder of the pages ({DEFAULT_OUTPUT})",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where pages are stale or a name is not found, 2 for mistakes."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "where":
            found = _where(options.name, options.output)
            sys.stdout.flush()
            return found
        if options.source_url not in ("", NO_LINKS) and "{path}" not in options.source_url:
            raise OutputError(
                f"--source-url {options.source_url!r} has no {{path}} in it; expected such as https://host/blob/main/{{path}}"
            )
        if options.jobs < 0:
            raise OutputError(f"--jobs {options.jobs}; expected 1 or more, or 0 for one for each core")
        return _build(options)
    except BrokenPipeError:  # `codeindex where x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RepositoryError, OutputError, BrokenProcessPool, OSError) as error:
        print(f"codeindex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncodeindex: stopped; run it again to complete the pages", file=sys.stderr)
        return 130


def _build(options: argparse.Namespace) -> int:
    check = options.command == "check"
    bar = _Bar(sys.stderr.isatty() and not options.quiet)
    settings = Options(tuple(options.ignore), options.generated, options.source_url, options.title)
    changes = build(options.repository, options.output, settings, check=check, jobs=options.jobs, progress=bar)
    bar.clear()
    if check and changes:
        _tell_stale(changes, options)
        return 1
    about = f"{count(changes.files, 'file')}, {count(changes.pages, 'page')}"
    if changes.left_out:
        about += f" ({count(changes.left_out, 'generated file')} left out)"
    print(
        f"{about}: up to date"
        if check
        else f"{about}: {len(changes.written):,} written, {len(changes.deleted):,} deleted"
    )
    return 0


def _tell_stale(changes: Changes, options: argparse.Namespace) -> None:
    stale = [*changes.written, *changes.deleted]
    for page in stale[:10]:
        print(f"stale: {page}")
    if len(stale) > 10:
        print(f"and {count(len(stale) - 10, 'more page')}")
    print(
        f"codeindex: {count(len(stale), 'page')} of {options.output} stale; `codeindex build` writes them",
        file=sys.stderr,
    )


def _where(name: str, output: Path) -> int:
    found = where(name, output)
    for place in found:
        at = f"{place.start}-{place.end}" if place.end > place.start else str(place.start)
        print(f"{place.path}:{at}: {place.kind} {place.name}")
        for user in place.users:
            print(f"    used in {user}")
    if not found:
        print(f"codeindex: no definition of {name} in the index of {output}", file=sys.stderr)
    return 0 if found else 1


class _Bar:
    """A progress bar on a terminal."""

    def __init__(self, on: bool) -> None:
        self._on, self._last = on, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._on and (now - self._last > 0.1 or done == total):
            self._last = now
            filled = 30 * done // max(total, 1)
            print(
                f"\r\x1b[K{what:8} [{'#' * filled}{'.' * (30 - filled)}] {done:,}/{total:,}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
