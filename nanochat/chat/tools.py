"""
The calculator that the model may call: arithmetic and counting in words, as in 12*(3+4), 1,234/2,
'strawberry'.count('r') or len('tree').

An expression must match a small alphabet; then it is parsed to a syntax tree, and this file, not
Python's eval, computes the few kinds of nodes named here. The calculator refuses everything else:
names, attributes, indexing, comparisons, formatted strings, backslashes, integers beyond MAX_DIGITS
digits (before it computes them), and anything long or deep. No operation is slow, so there is no
timeout.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # nested operations
MAX_DIGITS = 100  # of any integer, intermediate results included

_ALPHABET = re.compile(
    r"""(?:
      [ \t\r\n] | [-+*/%()] | '[^'\\\r\n]*+' | "[^"\\\r\n]*+" | \.count(?!\w) | len(?!\w)
      | (?:[0-9]++(?:\.[0-9]*+)?+ | \.[0-9]++)(?:[eE][-+]?[0-9]++)?+(?![\w.])
    )*+""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"(?<![\w.,])[0-9]{1,3}(?:,[0-9]{3})+(?![\w,])")


class ToolCalls:
    """Follows the tokens that a model samples in one reply, and answers the tool calls in them."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._call: list[int] | None = None  # the tokens of an open call

    def answer(self, id: int) -> list[int]:
        """The calculator's output as tokens if `id` ends a tool call that it accepts, else []."""
        specials = self._tokenizer.specials
        if id == specials["<|python_start|>"]:
            self._call = []
        elif self._call is not None and id == specials["<|python_end|>"]:
            result, self._call = calculate(self._tokenizer.decode(self._call)), None
            if result is not None:
                output = self._tokenizer.encode(result)
                return [specials["<|output_start|>"], *output, specials["<|output_end|>"]]
        elif self._call is not None:
            self._call.append(id)
        return []


def calculate(expression: str) -> str | None:
    """
    The result as the model reads it, or None if the calculator refuses; never raises. Integers are
    written in full, other numbers with 15 significant digits, all of which a double preserves.
    """
    if len(expression) > MAX_LENGTH:
        return None
    text = expression.strip()
    if "'" not in text and '"' not in text:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if not _ALPHABET.fullmatch(text):
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None  # the last two: nested too deep for Python's parser
    return str(value) if isinstance(value, int) else f"{value + 0.0:.15g}"  # -0.0 + 0.0 is 0.0


def _power(base: int | float, exponent: int | float) -> int | float | complex:
    integers = isinstance(base, int) and isinstance(exponent, int)
    if integers and abs(base) > 1 and exponent * math.log10(abs(base)) > MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    return base**exponent


_OPERATIONS: dict[type, Callable] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _value(node: ast.expr, depth: int) -> int | float:
    """The value of a syntax tree. Raises ValueError or ArithmeticError when it has none here."""
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH} operations")
    match node:
        case ast.Constant(value=int() | float() as value):
            return _checked(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _checked(_OPERATIONS[type(op)](_value(operand, depth - 1)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            operands = _value(left, depth - 1), _value(right, depth - 1)
            return _checked(_OPERATIONS[type(op)](*operands))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
        ):
            return text.count(part)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str() as text)]):
            return len(text)
    raise ValueError("not arithmetic, 'text'.count('t') or len('text')")


def _checked(value: int | float | complex) -> int | float:
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError("not a finite real number")
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    return value
