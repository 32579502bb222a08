"""Which file imports which, which tests exercise which, and who uses a name."""

from __future__ import annotations

import posixpath
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

from codeindex.facts import DOCUMENTS, Facts, Import

_C_FAMILY = ("C", "C++", "CUDA")
_SCRIPT_FAMILY = ("JavaScript", "TypeScript")
_SCRIPT_ENDINGS = (".ts", ".tsx", ".d.ts", ".mts", ".cts", ".js", ".jsx", ".mjs", ".cjs", ".json")
FAMILIES = {language: "C" for language in _C_FAMILY} | {language: "JavaScript" for language in _SCRIPT_FAMILY}
"""Languages whose files can import each other, where the name is not the language's own."""

_ROOTS = ("", "src", "lib", "python")
"""Folders that are on Python's path by convention."""
_C_HEADERS = {f"{name}.h" for name in (
    "assert", "complex", "ctype", "dirent", "dlfcn", "errno", "fcntl", "fenv", "float", "inttypes", "limits", "locale",
    "math", "pthread", "sched", "semaphore", "setjmp", "signal", "stdalign", "stdarg", "stdatomic", "stdbool", "stddef",
    "stdint", "stdio", "stdlib", "string", "strings", "syslog", "termios", "tgmath", "threads", "time", "uchar",
    "unistd", "wchar", "wctype", "windows",
)}  # fmt: skip
_TEST_FILE = re.compile(
    r"(?:^|/)(?:conftest\.py|test_[^/]*\.\w+|[^/]*_tests?\.\w+|[^/]*\.(?:test|spec)\.\w+|[^/]*Tests?\.(?:java|cpp|cc))$"
)
_TEST_FOLDER = re.compile(r"(?:^|/)(?:tests?|__tests__)/")


def is_test(path: str) -> bool:
    """Whether a file is a test or helps tests, by the conventions of its name or folder."""
    return _TEST_FILE.search(path) is not None or _TEST_FOLDER.search(path) is not None


def holds_tests(path: str, own: Facts) -> bool:
    """Whether there are tests in a file, and not only what helps them."""
    if own.language == "Python":
        tests = (each for each in own.definitions if not each.kind.startswith("local "))
        return is_test(path) and any(each.name.rpartition(".")[2].lower().startswith("test") for each in tests)
    return _TEST_FILE.search(path) is not None or path.endswith(".bats")


class Graph:
    """The imports between the files of one repository.

    Attributes:
        imports: the files that each file imports, sorted.
        importers: the files that import each file, sorted.
    """

    def __init__(self, facts: Mapping[str, Facts]) -> None:
        self._facts = facts
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_folder: dict[str, list[str]] = defaultdict(list)
        for path in facts:
            self._by_name[posixpath.basename(path)].append(path)
            self._by_folder[posixpath.dirname(path)].append(path)
        self._by_last: dict[str, list[str]] = defaultdict(list)
        for folder in self._by_folder:
            self._by_last[posixpath.basename(folder)].append(folder)
        self._go_modules = {
            each.name: posixpath.dirname(path)
            for path, own in facts.items() if own.language == "Go module" for each in own.definitions
        }  # fmt: skip
        self._modules = _python_modules(facts)
        self.imports: dict[str, tuple[str, ...]] = {}
        self._outside: dict[str, set[str]] = defaultdict(set)
        importers: dict[str, list[str]] = defaultdict(list)
        for path, own in facts.items():
            found: set[str] = set()
            for each in own.imports:
                targets = set(self._resolve(path, own, each))
                found |= targets
                if not targets and each.target:
                    self._outside[path].add(each.target.split(".")[0] if own.language == "Python" else each.target)
            found.discard(path)
            self.imports[path] = tuple(sorted(found))
            for target in found:
                importers[target].append(path)
        self.importers = {path: tuple(sorted(each)) for path, each in importers.items()}

    def tests_of(self, path: str) -> tuple[str, ...]:
        """The tests that import a file."""
        importers = self.importers.get(path, ())
        return tuple(each for each in importers if is_test(each) and self._facts[each].language not in DOCUMENTS)

    def outside(self, path: str) -> set[str]:
        """What a file imports that is not in the repository."""
        return self._outside.get(path, set())

    def _resolve(self, path: str, own: Facts, each: Import) -> Iterable[str]:
        language = own.language
        if language == "Python":
            return self._python(path, own, each)
        if language in _C_FAMILY:
            return self._included(path, each.target)
        if language in _SCRIPT_FAMILY:
            return self._script(path, each.target)
        if language == "Go":
            return self._go(each.target)
        if language == "Rust":
            return self._rust(path, each.target)
        if language == "Java":
            return self._java(each.target)
        return self._linked(path, each.target)

    # Python

    def _python(self, path: str, own: Facts, each: Import) -> Iterator[str]:
        module, target = self._target(path, each), each.target
        while module is None and "." in target and not each.level:  # a module that git does not have, of a package
            target = target.rpartition(".")[0]
            module = self._module(path, target)
        if not each.names:
            if module is not None:
                yield module
                yield from self._through(module, set(own.mentions))
            return
        for name in each.names:
            inner = self._target(path, each, name)
            if inner is not None:
                yield inner
            elif module is not None:
                yield module
                yield from self._defining(module, name, set())

    def _target(self, path: str, each: Import, name: str = "") -> str | None:
        """The file of an imported module, or of one in it."""
        target = ".".join(filter(None, (each.target, name)))
        if not each.level:
            return self._module(path, target)
        folder = posixpath.dirname(path)
        for _ in range(each.level - 1):
            if not folder:
                return None
            folder = posixpath.dirname(folder)
        stem = posixpath.join(folder, *filter(None, target.split(".")))
        files = (posixpath.join(stem, "__init__.py"), f"{stem}.py", f"{stem}.pyi", posixpath.join(stem, "__init__.pyi"))
        return next((file for file in files if file in self._facts), None)

    def _module(self, path: str, name: str) -> str | None:
        """The file that a module's name stands for in the file `path`: of several, the nearest."""
        if name.partition(".")[0] in sys.stdlib_module_names:
            return None
        found = [
            file for folder, file in self._modules.get(name, ())
            if "." in name or posixpath.basename(folder) in _ROOTS or f"{path}/".startswith(f"{folder}/")
            or posixpath.basename(file).startswith("__init__.")
        ]  # fmt: skip
        return _nearest(path, found)

    def _through(self, module: str, mentions: set[str]) -> Iterator[str]:
        """Where the names come from that a file takes from an imported package as attributes."""
        for each in self._facts[module].imports:
            for name in mentions.intersection(each.names):
                yield from self._defining(module, name, set())

    def _defining(self, module: str, name: str, seen: set[str]) -> Iterator[str]:
        """The file that a name comes from which a module imports itself."""
        if module in seen:
            return
        seen.add(module)
        own = self._facts[module]
        if any(each.name == name for each in own.definitions):
            yield module
            return
        for each in own.imports:
            if name in each.names or "*" in each.names:
                target = self._target(module, each)
                if target is not None:
                    yield from self._defining(target, name, seen)

    # the others

    def _included(self, path: str, target: str) -> Iterator[str]:
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if beside in self._facts:
            yield beside
            return
        if target in _C_HEADERS:
            return
        wanted = posixpath.normpath(target)
        ends = [each for each in self._by_name.get(posixpath.basename(wanted), ())
                if each == wanted or each.endswith(f"/{wanted}")]  # fmt: skip
        found = _nearest(path, ends)
        if found is not None:
            yield found

    def _script(self, path: str, target: str) -> Iterator[str]:
        if not target.startswith("."):
            return
        base = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        stem = posixpath.splitext(base)[0]
        names = [base, *(base + end for end in _SCRIPT_ENDINGS), *(f"{base}/index{end}" for end in _SCRIPT_ENDINGS),
                 *(stem + end for end in _SCRIPT_ENDINGS)]  # fmt: skip
        found = next((name for name in names if name in self._facts), None)
        if found is not None:
            yield found

    def _go(self, target: str) -> Iterator[str]:
        modules = [name for name in self._go_modules if f"{target}/".startswith(f"{name}/")]
        if modules:
            name = max(modules, key=len)
            folder = posixpath.normpath(posixpath.join(self._go_modules[name], target[len(name) + 1 :]))
            inside = self._by_folder.get("" if folder == "." else folder, ())
            yield from (each for each in inside if each.endswith(".go") and not each.endswith("_test.go"))

    def _rust(self, path: str, target: str) -> Iterator[str]:
        parts = [part for part in target.split("::") if part]
        folder = posixpath.dirname(path)
        stem = posixpath.splitext(posixpath.basename(path))[0]
        own = folder if stem in ("mod", "lib", "main") else posixpath.join(folder, stem)
        if parts[:1] == ["crate"]:
            root = _before(path, "src")
            bases, parts = [root] if root is not None else [], parts[1:]
        elif parts[:1] == ["super"]:
            base = posixpath.dirname(own)
            while parts[:1] == ["super"] and parts[1:2] == ["super"]:
                base, parts = posixpath.dirname(base), parts[1:]
            bases, parts = [base], parts[1:]
        elif parts[:1] == ["self"]:
            bases, parts = [own], parts[1:]
        else:
            bases = [own]
        for base in bases:
            for length in range(len(parts), 0, -1):
                stem = posixpath.join(base, *parts[:length])
                for each in (f"{stem}.rs", f"{stem}/mod.rs"):
                    if each in self._facts:
                        yield each
                        return

    def _java(self, target: str) -> Iterator[str]:
        parts = target.split(".")
        while parts:
            if parts[-1] == "*":
                parts.pop()
                folder = "/".join(parts)
                packages = [each for each in self._by_last.get(parts[-1] if parts else "", ())
                            if each == folder or each.endswith(f"/{folder}")]  # fmt: skip
                if packages:
                    files = (file for each in packages for file in self._by_folder[each])
                    yield from (file for file in files if file.endswith(".java"))
                    return
                continue
            name = "/".join(parts) + ".java"
            ends = [each for each in self._by_name.get(f"{parts[-1]}.java", ())
                    if each == name or each.endswith(f"/{name}")]  # fmt: skip
            if ends:
                yield min(ends, key=lambda each: (len(each), each))
                return
            parts.pop()  # of a nested class or a static member

    def _linked(self, path: str, target: str) -> Iterator[str]:
        if re.match(r"[a-zA-Z][\w+.-]*:|//|#", target):
            return
        target = unquote(target.split("#")[0].split("?")[0])
        base = "" if target.startswith("/") else posixpath.dirname(path)
        found = posixpath.normpath(posixpath.join(base, target.lstrip("/")))
        if target and found in self._facts:
            yield found


def _python_modules(facts: Mapping[str, Facts]) -> dict[str, list[tuple[str, str]]]:
    """Python files by the names that they can be imported by, each with the folder that has to be on Python's path."""
    inits = ("__init__.py", "__init__.pyi")
    packages = {posixpath.dirname(path) for path in facts if posixpath.basename(path) in inits}
    own_name = _own_name(facts) if "" in packages else ""
    modules: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, own in facts.items():
        if own.language != "Python" or not path.endswith((".py", ".pyi")):
            continue
        folder, file = posixpath.split(path)
        stem = posixpath.splitext(file)[0]
        parts = [] if stem == "__init__" else [stem]
        while folder in packages and folder:
            folder, last = posixpath.split(folder)
            parts.insert(0, last)
        if parts:
            modules[".".join(parts)].append((folder, path))
        while folder and posixpath.basename(folder) not in _ROOTS:  # folders without __init__.py can be packages too
            folder, last = posixpath.split(folder)
            parts.insert(0, last)
            modules[".".join(parts)].append((folder, path))
        if own_name and not folder:  # the repository's folder is a package itself
            modules[".".join([own_name, *parts])].append(("", path))
    return modules


def _own_name(facts: Mapping[str, Facts]) -> str:
    """The name of a package whose folder is the repository itself: what its files call it most often."""
    inside = {path.split("/")[0].removesuffix(".py") for path in facts}
    targets = (each.target.split(".") for own in facts.values() if own.language == "Python" for each in own.imports)
    said = Counter(parts[0] for parts in targets if len(parts) > 1 and parts[1] in inside)
    return max(said, key=lambda name: (said[name], name), default="")


def _nearest(path: str, files: Iterable[str]) -> str | None:
    """The file that has most folders in common with `path`."""
    return max(files, key=lambda each: (_shared(each, path), -len(each), each), default=None)


def _shared(first: str, second: str) -> int:
    """How many folders two paths have in common."""
    count = 0
    for a, b in zip(first.split("/")[:-1], second.split("/")[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count


def _before(path: str, folder: str) -> str | None:
    """The path down to the last folder of that name in it."""
    parts = path.split("/")[:-1]
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] == folder:
            return "/".join(parts[: at + 1])
    return None
