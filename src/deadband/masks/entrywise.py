"""Whether a function of the user works entry by entry, so that many features can be given to it as one tensor."""

from __future__ import annotations

import dis
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch

_FUNCTIONS = """
abs absolute add arccos arcsin arctan atan2 ceil clamp clamp_max clamp_min copysign cos cosh detach div divide double
erf exp exp2 expm1 float floor fmax fmin hypot lerp log log10 log1p log2 logaddexp maximum minimum mul multiply neg
negative positive pow reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square sub subtract tan tanh true_divide
trunc truediv
"""
_STRAIGHT = """
RESUME CACHE NOP PRECALL CALL CALL_FUNCTION CALL_METHOD PUSH_NULL COPY_FREE_VARS MAKE_CELL LOAD_FAST STORE_FAST
LOAD_FAST_LOAD_FAST LOAD_FAST_BORROW LOAD_FAST_BORROW_LOAD_FAST_BORROW RETURN_VALUE UNARY_NEGATIVE BINARY_ADD
BINARY_SUBTRACT BINARY_MULTIPLY BINARY_TRUE_DIVIDE BINARY_POWER
"""
_NAMES = frozenset(_FUNCTIONS.split())
_MODULES = (torch, operator, math)
_OPERATORS = frozenset(("+", "-", "*", "/", "**"))
_INSTRUCTIONS = frozenset(_STRAIGHT.split())


def is_entrywise(function: Callable[..., Any]) -> bool:
    """Whether `function` provably computes each entry of its result from the same entry of its arguments, and no more.

    True for the functions of torch and operator that do, and for Python functions that are one straight line of such
    calls, arithmetic, and numbers. Anything else, branches and shapes among it, counts as not.

    Example:
        >>> is_entrywise(torch.add), is_entrywise(lambda a, b: torch.maximum(a, b.abs()) * 0.5)
        (True, True)
        >>> is_entrywise(lambda a, b: a + b / b.numel()), is_entrywise(lambda a, b: a + b.norm())
        (False, False)
    """
    if isinstance(function, types.FunctionType):
        return all(_allowed(each, function) for each in dis.get_instructions(function))
    named = getattr(function, "__name__", "")
    return named in _NAMES and any(getattr(module, named, None) is function for module in _MODULES)


def _allowed(instruction: dis.Instruction, function: types.FunctionType) -> bool:
    kind, value = instruction.opname, instruction.argval
    if kind == "BINARY_OP":
        return instruction.argrepr in _OPERATORS
    if kind in ("LOAD_CONST", "LOAD_SMALL_INT", "RETURN_CONST"):
        return _is_number(value)
    if kind in ("LOAD_ATTR", "LOAD_METHOD"):
        return value in _NAMES
    if kind == "LOAD_GLOBAL":
        found = function.__globals__.get(value)
        return _is_number(found) or any(found is module for module in _MODULES)
    if kind == "LOAD_DEREF":
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        return value in cells and _is_number(cells[value].cell_contents)
    return kind in _INSTRUCTIONS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
