from __future__ import annotations

import pytest
from codeindex.facts import Facts
from codeindex.graph import Graph, is_test
from codeindex.languages import parse
from codeindex.names import Names, simple_name


def facts_of(files: dict[str, str]) -> dict[str, Facts]:
    return {path: parse(path, source.encode()) for path, source in sorted(files.items())}


def imports(files: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {path: found for path, found in Graph(facts_of(files)).imports.items() if found}


def test_python_packages_relative_imports_and_source_folders():
    found = imports({
        "src/pkg/__init__.py": "from pkg.core import run\nfrom . import extra\n",
        "src/pkg/core.py": "import os\ndef run(): ...\n",
        "src/pkg/extra.py": "from .core import run\nfrom .sub.deep import a\n",
        "src/pkg/sub/__init__.py": "",
        "src/pkg/sub/deep.py": "from ..core import run\nfrom ... import nothing\na = 1\n",
        "tests/test_core.py": "import pkg.core\n",
        "tests/test_all.py": "import pkg\npkg.run()\n",
        "tools/helper.py": "",
        "tools/main.py": "import helper\n",
    })  # fmt: skip
    assert found == {
        "src/pkg/__init__.py": ("src/pkg/core.py", "src/pkg/extra.py"),
        "src/pkg/extra.py": ("src/pkg/core.py", "src/pkg/sub/deep.py"),
        "src/pkg/sub/deep.py": ("src/pkg/core.py",),
        "tests/test_core.py": ("src/pkg/core.py",),
        "tests/test_all.py": ("src/pkg/__init__.py", "src/pkg/core.py"),
        "tools/main.py": ("tools/helper.py",),
    }


def test_a_module_of_the_standard_library_is_not_a_file_of_the_same_name_elsewhere():
    assert imports({"a/types.py": "", "b/use.py": "import types\n"}) == {}


def test_other_languages():
    assert imports({"include/x/a.h": "", "src/b.cpp": '#include <x/a.h>\n#include "c.h"\n', "src/c.h": ""}) == {
        "src/b.cpp": ("include/x/a.h", "src/c.h")
    }
    assert imports(
        {"web/a.ts": "import './b'; import './c.js'; import 'react'\n", "web/b/index.ts": "", "web/c.ts": ""}
    ) == {"web/a.ts": ("web/b/index.ts", "web/c.ts")}
    assert imports(
        {
            "go.mod": "module example.org/m\n",
            "fmt/fmt.go": "",
            "sub/a.go": "package sub\n",
            "main.go": 'package main\nimport "fmt"\nimport "example.org/m/sub"\n',
        }
    ) == {"main.go": ("sub/a.go",)}
    assert imports({"src/lib.rs": "mod a;\nuse crate::b::C;\n", "src/a.rs": "use super::b;\n", "src/b/mod.rs": ""}) == {
        "src/lib.rs": ("src/a.rs", "src/b/mod.rs"), "src/a.rs": ("src/b/mod.rs",),
    }  # fmt: skip
    assert imports(
        {"s/org/a/A.java": "import org.b.B;\nimport org.c.*;\n", "s/org/b/B.java": "", "s/org/c/C.java": ""}
    ) == {"s/org/a/A.java": ("s/org/b/B.java", "s/org/c/C.java")}
    assert imports({"a.sh": ". ./lib/b.sh\n", "lib/b.sh": ""}) == {"a.sh": ("lib/b.sh",)}
    assert imports({"docs/a.md": "[x](../b.py#L3) [y](https://z) [z](c%20d.md)\n", "b.py": "", "docs/c d.md": ""}) == {
        "docs/a.md": ("b.py", "docs/c d.md")
    }


def test_tests_are_known_by_name_or_folder():
    yes = ["tests/helper.py", "a/test_b.py", "a/b_test.go", "a/b.spec.ts", "x/BoxTest.java", "conftest.py"]
    assert all(map(is_test, yes))
    assert not any(map(is_test, ["testing.py", "src/contest.py", "a/latest/b.py", "protest/c.py"]))


def users(files: dict[str, str], path: str, name: str) -> list[str]:
    facts = facts_of(files)
    return Names(facts, Graph(facts)).users(path, next(each for each in facts[path].definitions if each.name == name))


def test_python_needs_an_import_to_use_a_name():
    files = {
        "a.py": "class Only: ...\ndef lines(): ...\n",
        "b.py": "from a import Only\nOnly()\n",
        "c.py": "Only()\n'Only'\nx.lines()\n",
        "d.md": "`Only` and Only\n",
        "e.md": "Only\n",
        "f.py": "import a\ndef f(lines):\n    return lines\n",
        "g.py": "import a\na.lines()\n",
    }
    assert users(files, "a.py", "Only") == ["b.py", "d.md"]
    assert users(files, "a.py", "lines") == ["g.py"]


def test_documents_name_a_method_with_its_class():
    files = {"a.py": "class Book:\n    def page(self): ...\n", "b.md": "`page`\n", "c.md": "`Book` and `page()`\n"}
    assert users(files, "a.py", "Book.page") == ["c.md"]


def test_c_needs_none():
    files = {"a.c": "int only(void) { return 1; }\n", "b.c": "int f(void) { return only(); }\n", "c.c": "// only\n"}
    assert users(files, "a.c", "only") == ["b.c"]


def test_a_name_that_several_define_is_used_by_those_that_import_it():
    files = {
        "a.py": "def run(): ...\n",
        "b.py": "def run(): ...\n",
        "c.py": "from a import run\nrun()\n",
        "d.py": "run()\n",
    }
    assert users(files, "a.py", "run") == ["c.py"]
    assert users(files, "b.py", "run") == []


def test_uses_through_a_package_that_hands_a_name_on():
    files = {"p/__init__.py": "from p.a import run\n", "p/a.py": "def run(): ...\n", "p/b.py": "def run(): ...\n",
             "t/test_a.py": "import p\np.run()\n", "t/test_b.py": "from p import run\n"}  # fmt: skip
    assert users(files, "p/a.py", "run") == ["p/__init__.py", "t/test_a.py", "t/test_b.py"]
    assert users(files, "p/b.py", "run") == []


def test_import_cycles_end():
    files = {
        "p/__init__.py": "from p.a import x\n",
        "p/a.py": "from p import x\n",
        "q.py": "from p import x\nimport p\np.x\n",
    }
    assert imports(files)["q.py"] == ("p/__init__.py",)


def test_a_repository_that_is_a_package_itself():
    files = {
        "__init__.py": "from thing.core import run\n",
        "core.py": "def run(): ...\n",
        "_c/__init__.pyi": "def native(): ...\n",
        "sub/__init__.py": "from thing._c import native\nfrom thing.core import run\nfrom core import run\n",
        "tests/test_core.py": "from sub import x\n",
    }
    assert imports(files) == {
        "__init__.py": ("core.py",),
        "sub/__init__.py": ("_c/__init__.pyi", "core.py"),
        "tests/test_core.py": ("sub/__init__.py",),
    }


def test_headers_of_c_are_outside():
    assert imports({"util/time.h": "", "a.c": "#include <time.h>\n", "util/b.c": '#include "time.h"\n'}) == {
        "util/b.c": ("util/time.h",)
    }


def test_documents_test_nothing():
    graph = Graph(facts_of({"tests/README.md": "[x](../a.py)\n", "tests/test_a.py": "import a\n", "a.py": ""}))
    assert graph.tests_of("a.py") == ("tests/test_a.py",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Class.method", "method"),
        ("ns::Class<a::B<c>>::method", "method"),
        ("ns::hash<ns::Key>", "hash"),
        ("C::operator<", "operator<"),
        ("operator<<", "operator<<"),
        ("C::operator std::string", "operator std::string"),
        ('files."a.py"', "a.py"),
        ("...", "..."),
    ],
)
def test_names_are_looked_up_by_their_last_part(name, expected):
    assert simple_name(name) == expected
