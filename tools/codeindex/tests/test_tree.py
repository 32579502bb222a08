from __future__ import annotations

import pytest
from codeindex.facts import Facts
from codeindex.languages import parse

# language: file name, source, definitions (name, kind, first line), imports
SOURCES = {
    "c": (
        "a.c",
        """\
#include <stdio.h>
#include "own/part.h"
#define LIMIT 3
#define TWICE(x) ((x) + (x))
/* A point. */
struct point { int x; };
typedef struct { int a; } anonymous_t;
typedef int (*handler)(int);
enum colour { RED };
union either { int i; };
static int helper(int a);
// Adds.
int add(int a, int b) { return a + b; }
char *name_of(struct point *p) { return 0; }
""",
        [
            ("LIMIT", "macro", 3),
            ("TWICE", "macro", 4),
            ("point", "struct", 6),
            ("anonymous_t", "type", 7),
            ("handler", "type", 8),
            ("colour", "enum", 9),
            ("either", "union", 10),
            ("helper", "function", 11),
            ("add", "function", 13),
            ("name_of", "function", 14),
        ],
        ["stdio.h", "own/part.h"],
    ),
    "c++": (
        "a.hpp",
        """\
#pragma once
#include <vector>
namespace one::two {
template <typename T>
class Box : public Base<T> {
 public:
  Box(int size);
  ~Box();
  T& at(int i) const;
  bool operator==(const Box& other) const { return true; }
  static void make();
  int field;
  struct Inner { void deep() {} };
};
namespace {
void hidden() {}
}
template <class T>
T least(T a, T b);
using Short = Box<int>;
}
int one::two::Box<int>::size() { return 1; }
TEST(Box, IsEmpty) { }
extern "C" { void exported(int); }
""",
        [
            ("one::two::Box", "class", 5),
            ("one::two::Box::Box", "method", 7),
            ("one::two::Box::~Box", "method", 8),
            ("one::two::Box::at", "method", 9),
            ("one::two::Box::operator==", "method", 10),
            ("one::two::Box::make", "method", 11),
            ("one::two::Box::Inner", "struct", 13),
            ("one::two::Box::Inner::deep", "method", 13),
            ("one::two::hidden", "function", 16),
            ("one::two::least", "function", 19),
            ("one::two::Short", "type", 20),
            ("one::two::Box<int>::size", "method", 22),
            ("Box.IsEmpty", "function", 23),
            ("exported", "function", 24),
        ],
        ["vector"],
    ),
    "cuda": (
        "a.cu",
        """\
#include "a.cuh"
// Doubles each.
__global__ void twice(float* x) { x[threadIdx.x] *= 2; }
void launch() { twice<<<1, 2>>>(0); }
""",
        [("twice", "function", 3), ("launch", "function", 4)],
        ["a.cuh"],
    ),
    "javascript": (
        "a.js",
        """\
import { one } from "./one.js";
export * from './two';
const three = require("three");
/** Adds. */
export function add(a, b) { return a + b; }
export default class Menu extends Base { open() {} static make() {} #secret() {} }
const arrow = (x) => x;
function* each() {}
""",
        [
            ("three", "variable", 3),
            ("add", "function", 5),
            ("Menu", "class", 6),
            ("Menu.open", "method", 6),
            ("Menu.make", "method", 6),
            ("Menu.#secret", "method", 6),
            ("arrow", "function", 7),
            ("each", "function", 8),
        ],
        ["./one.js", "./two", "three"],
    ),
    "typescript": (
        "a.ts",
        """\
import type { A } from "./a";
export interface Shape { area(): number }
export type Pair<T> = [T, T];
export enum Colour { Red }
abstract class Base { abstract run(): void; go(): void {} }
namespace Inner { export function deep(): void {} }
declare function outside(x: number): void;
""",
        [
            ("Shape", "interface", 2),
            ("Shape.area", "method", 2),
            ("Pair", "type", 3),
            ("Colour", "enum", 4),
            ("Base", "class", 5),
            ("Base.run", "method", 5),
            ("Base.go", "method", 5),
            ("Inner", "namespace", 6),
            ("Inner.deep", "function", 6),
            ("outside", "function", 7),
        ],
        ["./a"],
    ),
    "tsx": (
        "a.tsx",
        "export const App = () => <b>hi</b>;\nexport function Other() { return <App/>; }\n",
        [("App", "function", 1), ("Other", "function", 2)],
        [],
    ),
    "go": (
        "a.go",
        """\
package a

import (
	"fmt"
	other "example.org/m/sub"
)

const Limit = 3

// Box holds.
type Box[T any] struct{ v T }

// Open opens.
func (b *Box[T]) Open() error { return nil }

func helper() {}
""",
        [("Limit", "constant", 8), ("Box", "type", 11), ("Box.Open", "method", 14), ("helper", "function", 16)],
        ["fmt", "example.org/m/sub"],
    ),
    "go interfaces": (
        "b.go",
        """\
package b

type Reader interface {
	io.Closer
	Read(p []byte) (n int, err error)
	~int | string
}

type Adder[T any] interface {
	Add(T) T
}
type Same = interface{ Do() }

var (
	first    = 1
	Two, Tri int
)

const (
	A, B = 1, 2
	C
)

var fn = func() { type inner interface{ M() } }
""",
        [
            ("Reader", "type", 3),
            ("Reader.Read", "method", 5),
            ("Adder", "type", 9),
            ("Adder.Add", "method", 10),
            ("Same", "type", 12),
            ("Same.Do", "method", 12),
            ("first", "variable", 15),
            ("Two", "variable", 16),
            ("Tri", "variable", 16),
            ("A", "constant", 20),
            ("B", "constant", 20),
            ("C", "constant", 21),
            ("fn", "variable", 24),
            ("inner", "local type", 24),
            ("inner.M", "local method", 24),
        ],
        [],
    ),
    "javascript, assigned": (
        "b.js",
        """\
exports = module.exports = create;
function create() { this.shut = () => {}; }
app.listen = function listen(port) {};
exports.json = async (options) => 1;
exports['to-text'] = function* () {};
module.exports.parse = exports.read = function () {};
exports.LIMIT = 3; exports.create = create; exports.a = exports.b = void 0;
Foo.prototype.open = function () { function inner() {} };
Foo.prototype = { one: function () {}, two() {}, get three() { return 3 }, 'four': () => 4, five: 5 };
var proto = { go() {}, deep: { er: () => 1 } };
class Box { size = () => 1; static make = function () {}; #own = () => 2; count = 3 }
const Kit = class { m() {} }, wrapped = (function () {});
Foo.poly = Foo.poly || function () {};
x.y ||= () => 1;
later = () => 1;
find(x).last = function () {};
$.fn.menu = class { m() {} };
(function () { root.lib = function () {}; const helper = () => 1; })();
a.x = a.y = a.z = () => 1; Foo.prototype['w'] = function () {};
Object.defineProperty(exports, "query", { get() {} }); Object.defineProperty(exports, "__esModule", { value: true });
module.exports = { seven() {}, eight: () => 8, create, NINE: 9 };
""",
        [
            ("create", "function", 2),
            ("shut", "local method", 2),
            ("app.listen", "function", 3),
            ("json", "function", 4),
            ("to-text", "function", 5),
            ("parse", "function", 6),
            ("read", "function", 6),
            ("LIMIT", "variable", 7),
            ("Foo.open", "method", 8),
            ("inner", "local function", 8),
            ("Foo.one", "method", 9),
            ("Foo.two", "method", 9),
            ("Foo.three", "method", 9),
            ("Foo.four", "method", 9),
            ("proto", "variable", 10),
            ("proto.go", "method", 10),
            ("proto.deep.er", "method", 10),
            ("Box", "class", 11),
            ("Box.size", "method", 11),
            ("Box.make", "method", 11),
            ("Box.#own", "method", 11),
            ("Kit", "class", 12),
            ("Kit.m", "method", 12),
            ("wrapped", "function", 12),
            ("Foo.poly", "function", 13),
            ("x.y", "function", 14),
            ("later", "function", 15),
            ("last", "function", 16),
            ("$.fn.menu", "class", 17),
            ("$.fn.menu.m", "method", 17),
            ("root.lib", "function", 18),
            ("helper", "function", 18),
            ("a.x", "function", 19),
            ("a.y", "function", 19),
            ("a.z", "function", 19),
            ("Foo.w", "method", 19),
            ("query", "variable", 20),
            ("query.get", "method", 20),
            ("seven", "function", 21),
            ("eight", "function", 21),
            ("NINE", "variable", 21),
        ],
        [],
    ),
    "javascript, default exports": (
        "c.mjs",
        """\
export default () => 1;
export default class { m() {} }
export default { data() {}, methods: { go() {} } };
export const f = async () => 1, { g, h } = z;
""",
        [
            ("default", "function", 1),
            ("default", "class", 2),
            ("default.m", "method", 2),
            ("default", "variable", 3),
            ("default.data", "method", 3),
            ("default.methods.go", "method", 3),
            ("f", "function", 4),
            ("g", "variable", 4),
            ("h", "variable", 4),
        ],
        [],
    ),
    "typescript, declared": (
        "b.d.ts",
        """\
declare const VERSION: string, BUILD: number;
export declare let current: Reader;
declare function read(path: string): string;
declare function read(path: URL): string;
declare class Reader { next(): number; visit: (node: Node) => void; size: number }
declare abstract class Base { abstract run(): void; abstract go: () => void }
declare namespace util { function trim(s: string): string; const LIMIT: number; namespace inner { let deep: 1 } }
declare module "pkg/part.js" { export function load(): void; var once: number }
declare global { interface Window { open: () => void } function alarm(): void; var flag: boolean }
declare enum Mode { A }
declare type Text = string;
type Shape = { area(): number; side: number };
export namespace N { export const limit = 1; export const call = () => 1; const hidden = 2; export class K {} }
namespace A.B { export const c = { m() {} } as const }
declare const api: { get(): void; inner: { deep(): void } };
export import alias = A.B;
export default interface Options { deep?: boolean; each(node: Node): void }
""",
        [
            ("VERSION", "variable", 1),
            ("BUILD", "variable", 1),
            ("current", "variable", 2),
            ("read", "function", 3),
            ("read", "function", 4),
            ("Reader", "class", 5),
            ("Reader.next", "method", 5),
            ("Reader.visit", "method", 5),
            ("Base", "class", 6),
            ("Base.run", "method", 6),
            ("Base.go", "method", 6),
            ("util", "namespace", 7),
            ("util.trim", "function", 7),
            ("util.LIMIT", "variable", 7),
            ("util.inner", "namespace", 7),
            ("util.inner.deep", "variable", 7),
            ("pkg/part.js", "module", 8),
            ("pkg/part.js.load", "function", 8),
            ("pkg/part.js.once", "variable", 8),
            ("Window", "interface", 9),
            ("Window.open", "method", 9),
            ("alarm", "function", 9),
            ("flag", "variable", 9),
            ("Mode", "enum", 10),
            ("Text", "type", 11),
            ("Shape", "type", 12),
            ("Shape.area", "method", 12),
            ("N", "namespace", 13),
            ("N.limit", "variable", 13),
            ("N.call", "function", 13),
            ("N.hidden", "variable", 13),
            ("N.K", "class", 13),
            ("A.B", "namespace", 14),
            ("A.B.c", "variable", 14),
            ("A.B.c.m", "method", 14),
            ("api", "variable", 15),
            ("api.get", "method", 15),
            ("api.inner.deep", "method", 15),
            ("alias", "variable", 16),
            ("Options", "interface", 17),
            ("Options.each", "method", 17),
        ],
        [],
    ),
    "rust": (
        "a.rs",
        """\
use crate::a::{b, c::d as e};
mod part;
/// A box.
pub struct Holder<T> { v: T }
impl<T> Holder<T> {
    pub fn open(&self) {}
    fn shut(&self) {}
}
pub trait Shape { fn area(&self) -> f64; }
enum Colour { Red }
macro_rules! many { () => {} }
mod inner { pub fn deep() {} }
const LIMIT: u8 = 1;
""",
        [
            ("Holder", "struct", 4),
            ("Holder<T>::open", "method", 6),
            ("Holder<T>::shut", "method", 7),
            ("Shape", "trait", 9),
            ("Shape::area", "method", 9),
            ("Colour", "enum", 10),
            ("many", "macro", 11),
            ("inner", "module", 12),
            ("inner::deep", "function", 12),
            ("LIMIT", "constant", 13),
        ],
        ["crate::a::b", "crate::a::c::d", "part"],
    ),
    "java": (
        "A.java",
        """\
package a;
import java.util.List;
import static a.B.make;
/** A thing. */
public class A extends B {
    public A() {}
    private void hidden() {}
    int size() { return 1; }
    interface Part { void run(); }
    enum Colour { RED }
}
record Point(int x) {}
""",
        [
            ("A", "class", 5),
            ("A.A", "constructor", 6),
            ("A.hidden", "method", 7),
            ("A.size", "method", 8),
            ("A.Part", "interface", 9),
            ("A.Part.run", "method", 9),
            ("A.Colour", "enum", 10),
            ("Point", "record", 12),
        ],
        ["java.util.List", "a.B.make"],
    ),
    "shell": (
        "a.sh",
        """\
#!/bin/sh
# Starts all.
. ./lib.sh
source other.sh
start() { echo "x"; }
function stop { :; }
""",
        [("start", "function", 5), ("stop", "function", 6)],
        ["./lib.sh", "other.sh"],
    ),
}


@pytest.mark.parametrize("language", SOURCES)
def test_definitions_and_imports(language: str):
    name, source, definitions, imports = SOURCES[language]
    facts = parse(name, source.encode())
    assert not facts.error
    assert [(each.name, each.kind, each.start) for each in facts.definitions] == definitions
    assert [each.target for each in facts.imports] == imports


def one(name: str, source: str, of: str):
    return next(each for each in parse(name, source.encode()).definitions if each.name == of)


def test_comments_above_are_documentation():
    assert one("a.c", SOURCES["c"][1], "add").doc == "Adds."
    assert one("a.c", SOURCES["c"][1], "point").doc == "A point."
    assert one("a.js", SOURCES["javascript"][1], "add").doc == "Adds."
    assert one("a.go", SOURCES["go"][1], "Box.Open").doc == "Open opens."
    assert one("a.rs", SOURCES["rust"][1], "Holder").doc == "A box."
    assert one("A.java", SOURCES["java"][1], "A").doc == "A thing."
    assert one("a.c", "int x;  // of x\nint f(void) { return 1; }\n", "f").doc == ""


def test_the_leading_comment_is_the_files_own():
    licence = (
        "// Copyright (c) Somebody. All rights reserved.\n\n// Reads tables.\n// Fast.\n\n#include <a>\nint f();\n"
    )
    assert parse("a.cpp", licence.encode()).doc == "Reads tables."
    assert parse("a.cpp", b"// Adds.\nint f();\n\nint g();\n").doc == "Adds."
    assert parse("a.sh", SOURCES["shell"][1].encode()).doc == "Starts all."


def test_signatures_are_on_one_line_without_bodies():
    source = "template <class T>\nint add(int a,\n        int b)\n{ return a; }\n"
    assert one("a.cpp", source, "add").signature == "int add(int a, int b)"
    assert one("a.rs", SOURCES["rust"][1], "Shape::area").signature == "fn area(&self) -> f64"


def test_visibility():
    def public(name: str, source: str) -> set[str]:
        return {each.name for each in parse(name, source.encode()).definitions if each.public}

    assert "A.hidden" not in public("A.java", SOURCES["java"][1])
    assert public("a.go", SOURCES["go"][1]) == {"Limit", "Box", "Box.Open"}
    assert public("a.rs", SOURCES["rust"][1]) >= {"Holder", "Holder<T>::open"}
    assert "Holder<T>::shut" not in public("a.rs", SOURCES["rust"][1])
    assert "helper" not in public("a.c", SOURCES["c"][1])


RUST = """\
pub trait Shape { const SIDES: usize; type Unit; fn area(&self) -> f64; fn name(&self) -> String { "".into() } }
trait Own { fn own(&self); }
pub(crate) trait Crate { fn here(&self); }
pub struct Circle;
struct Secret;
impl Shape for Circle { type Unit = u8; fn area(&self) -> f64 { 1.0 } }
impl<T> std::fmt::Display for Circle { fn fmt(&self) { fn helper() {} } }
impl Own for Circle { fn own(&self) {} }
impl Shape for Secret { fn area(&self) -> f64 { 2.0 } }
impl Secret { pub fn open(&self) {} }
impl Circle { pub fn new() {} pub(crate) fn inside() {} fn alone() {} }
#[macro_export]
macro_rules! shared { () => {} }
macro_rules! kept { () => {} }
extern "C" { pub fn puts(); fn gets(); }
mod hidden { pub trait In { fn g(); } }
"""


def test_items_of_a_rust_trait_are_as_public_as_it_is():
    facts = parse("a.rs", RUST.encode())
    assert not facts.error
    private = {each.name for each in facts.definitions if not each.public}
    assert private == {
        *("Own", "Own::own", "Crate", "Crate::here", "Circle::own", "Circle::helper"),
        *("Secret", "Secret::area", "Secret::open", "Circle::inside", "Circle::alone", "kept", "gets"),
        *("hidden", "hidden::In", "hidden::In::g"),
    }
    public = [each.name for each in facts.definitions if each.public]
    assert public == [
        *("Shape", "Shape::SIDES", "Shape::Unit", "Shape::area", "Shape::name"),
        *("Circle", "Circle::Unit", "Circle::area", "Circle::fmt", "Circle::new", "shared", "puts"),
    ]


def test_what_does_not_parse_is_named_and_the_rest_read():
    facts = parse("a.c", b"int good(void) { return 1; }\n\nint bad( { ;\n\nint better(void) { return 2; }\n")
    assert facts.error.startswith("does not parse whole: line ")
    assert "good" in {each.name for each in facts.definitions}


def test_include_guards_are_no_definitions():
    source = """\
#ifndef PART_H
#define PART_H
#ifndef SIZE
#define SIZE 4
#endif
#ifdef FAST
#define QUICK
#endif
int part(int a);
#endif
"""
    facts = parse("part.h", source.encode())
    assert [each.name for each in facts.definitions] == ["SIZE", "QUICK", "part"]


def test_macros_for_compilers_hide_no_definition():
    source = """\
#define LIBRARY_INLINE inline __attribute__((always_inline))
// LIBRARY_API Thing here stays in the comment.
struct LIBRARY_API Thing final : public Base {
  LIBRARY_API const char* name() const;
};
class LIBRARY_EXPORT(part) Other { void f(); };
enum class LIBRARY_API Colour : int { Red };
LIBRARY_INLINE int add(int a) { return a; }
LIBRARY_API LIBRARY_INLINE std::ostream& operator<<(std::ostream&, const Thing&);
static const char* text = "LIBRARY_API is kept";
OTHER_TYPE make(OTHER_TYPE x) { return x; }
struct Defaults {
  int set(const Options& options = {}, int other = 0);
  LIBRARY_DEPRECATED("use set")
  int put() { return this->operator[](1) + (*this).operator()(2); }
};
"""
    facts = parse("a.h", source.encode())
    assert facts.error == ""
    assert [(each.name, each.kind, each.start) for each in facts.definitions] == [
        ("LIBRARY_INLINE", "macro", 1),
        ("Thing", "struct", 3),
        ("Thing::name", "method", 4),
        ("Other", "class", 6),
        ("Other::f", "method", 6),
        ("Colour", "enum", 7),
        ("add", "function", 8),
        ("operator<<", "function", 9),
        ("make", "function", 11),
        ("Defaults", "struct", 12),
        ("Defaults::set", "method", 13),
        ("Defaults::put", "method", 15),
    ]
    assert facts.definitions[1].doc == "LIBRARY_API Thing here stays in the comment."
    assert "LIBRARY_API" in facts.mentions


def test_mentions_leave_comments_and_strings_out():
    facts = parse("a.c", b'// alpha\nint f(void) { beta("gamma"); /* delta */ return x; }\n')
    assert {"beta", "f", "x"} <= set(facts.mentions)
    assert not {"alpha", "gamma", "delta"} & set(facts.mentions)


@pytest.mark.parametrize("name", [name for name, *_ in SOURCES.values()])
def test_any_bytes_are_read(name: str):
    for content in (b"", b"\xff\xfe{[(", b"\r\n\r\n", b"}" * 1000, "ünï \U0001f600 = {".encode(), b"(" * 20000):
        facts = parse(name, content)
        assert Facts.from_json(facts.to_json()) == facts


def named(name: str, source: str) -> list[tuple[str, str, int, int]]:
    return [(each.name, each.kind, each.start, each.end) for each in parse(name, source.encode()).definitions]


def test_c_in_conditions_and_classes():
    source = """\
#if A
int one(void);
#elif B
int two(void);
#else
int three(void);
#endif
typedef struct {
  int a;
} record_t;
struct S {
#if A
  int inside();
#endif
  int** twice();
  operator bool() const { return true; }
  void (*callback)(int);
};
void (*global_callback)(int);
"""
    assert named("a.hpp", source) == [
        ("one", "function", 2, 2),
        ("two", "function", 4, 4),
        ("three", "function", 6, 6),
        ("record_t", "type", 8, 10),
        ("S", "struct", 11, 18),
        ("S::inside", "method", 13, 13),
        ("S::twice", "method", 15, 15),
        ("S::operator bool", "method", 16, 16),
    ]


def test_what_is_inside_of_functions_is_local():
    java = "class A {\n void f() { new Runnable() { public void run() {} }; }\n}\n"
    assert named("A.java", java)[2] == ("A.run", "local method", 2, 2)
    rust = "fn f() {\n fn g() {}\n struct S {}\n}\n"
    assert [each[1] for each in named("a.rs", rust)] == ["function", "local function", "local struct"]
    assert named("a.cpp", "int f() {\n struct L { int m(); };\n int vexing(int);\n return 1; }\n") == [
        ("f", "function", 1, 4),
        ("L", "local struct", 2, 2),
        ("L::m", "local method", 2, 2),
    ]
    assert not any(each.public for each in parse("a.js", b"const f = () => { function g() {} }\n").definitions[1:])


def test_exports_are_what_is_public():
    source = "export function a() {}\nfunction b() {}\nconst c = 1\nclass D { m() {} }\nexport { c as e }\n"
    assert [each.name for each in parse("a.js", source.encode()).definitions if each.public] == ["a", "c"]
    assert all(each.public for each in parse("a.js", b"function b() {}\nconst c = 1\n").definitions)
    source = "export class A { private x() {} y() {} }\n"
    assert [each.name for each in parse("a.ts", source.encode()).definitions if each.public] == ["A", "A.y"]


def test_exports_of_namespaces_and_of_parts():
    def public(name: str, source: str) -> list[str]:
        return [each.name for each in parse(name, source.encode()).definitions if each.public]

    namespaces = """\
export namespace N { export const a = 1; const b = 2; function c() {} }
namespace O { export const d = 1 }
declare namespace P { const e: 1 }
export declare namespace Q { const f: 1; export const g: 2 }
export namespace R { let h: 1 }
declare module "m" { const i: 1; export const j: 2 }
declare global { function k(): void }
declare function l(): void;
"""
    assert public("a.ts", namespaces) == ["N", "N.a", "Q", "Q.f", "Q.g", "R", "R.h", "m", "m.i", "m.j", "k"]
    declared = "export declare let a: 1;\ndeclare const b: 2;\nexport namespace N { export const c: 3; const d: 4 }\n"
    assert public("a.ts", declared) == ["a", "N", "N.c"]
    assert public("a.d.ts", declared) == ["a", "b", "N", "N.c", "N.d"]
    assert public("a.d.ts", declared + "export {};\n") == ["a", "N", "N.c", "N.d"]
    parts = """\
export class A {}
class B {}
A.prototype.a = function () {};
B.prototype.b = function () {};
const proto = { c() {} };
make({ methods: { d() {} } });
A._own = () => 1;
"""
    assert public("a.mjs", parts) == ["A", "A.a"]
    assert public("a.js", parts.removeprefix("export ")) == [
        *("A", "B", "A.a", "B.b", "proto", "proto.c", "methods.d"),
    ]
    assert public("a.ts", "class A { m() {} }\nclass B {}\nexport = A;\n") == ["A", "A.m"]


def test_signatures_of_values_end_before_their_bodies():
    source = "app.get = async (a, b) => {\n  go();\n};\nFoo.x = Foo.x || function (c) { d(); };\nvar o = { m(e) {} };\n"
    found = parse("a.js", source.encode()).definitions
    assert [each.signature for each in found] == [
        *("app.get = async (a, b)", "Foo.x = Foo.x || function (c)", "o", "m(e)"),
    ]
    assert one("a.ts", "const f = ((x: number) => x) as F;\n", "f").signature == "f"
    assert (
        one("a.go", "package a\ntype R interface {\n\t// Reads.\n\tRead() error\n}\n", "R").signature == "R interface"
    )
    assert one("a.go", "package a\ntype R interface {\n\t// Reads.\n\tRead() error\n}\n", "R.Read").doc == "Reads."


def test_java_records_annotations_and_constants():
    source = """\
@interface A {
 String value();
}
record P(int x) {
 P { }
}
interface I { int MOST = 1, LEAST = 2; }
class C { public static final int ONE = 1; final static int TWO = 2; private static final int OWN = 3; int field; }
"""
    assert named("A.java", source) == [
        *(("A", "annotation", 1, 3), ("A.value", "method", 2, 2)),
        *(("P", "record", 4, 6), ("P.P", "constructor", 5, 5)),
        *(("I", "interface", 7, 7), ("I.MOST", "constant", 7, 7), ("I.LEAST", "constant", 7, 7)),
        *(("C", "class", 8, 8), ("C.ONE", "constant", 8, 8), ("C.TWO", "constant", 8, 8), ("C.OWN", "constant", 8, 8)),
    ]
    assert not one("A.java", source, "C.OWN").public
