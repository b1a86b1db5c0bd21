"""
The calculator that the model may call: arithmetic, and counting in words, as in 12*(3+4), 1,234/2, 'strawberry'.count('r') or len('tree').

An expression is checked against a small alphabet, parsed to a syntax tree, and only the node types named here are worked out, by this file
and never by Python's eval. It refuses everything else: names, attributes, indexing, comparisons, formatted strings, backslashes, numbers
beyond MAX_DIGITS digits (before computing them), and anything long or deep. It needs no thread, timer or signal, since nothing is slow.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_LENGTH = 256  # characters of an expression
MAX_DEPTH = 32  # of nested operations
MAX_DIGITS = 100  # of any integer on the way
_BOUND = 10**MAX_DIGITS

_ALPHABET = re.compile(
    r"""(?:[ \t\r\n] | [-+*/%()] | (?:[0-9]++(?:\.[0-9]*+)?+ | \.[0-9]++)(?:[eE][-+]?[0-9]++)?+(?![\w.])"""
    r""" | '[^'\\\r\n]*+' | "[^"\\\r\n]*+" | \.count(?!\w) | len(?!\w))*+""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"(?<![\w.,])[0-9]{1,3}(?:,[0-9]{3})+(?![\w,])")
_OPERATIONS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Refused(ValueError):
    """Not an expression for the calculator; the message is the reason in a few words."""


def calculate(expression: str) -> str | None:
    """The result as the model is to read it, or None where the calculator refuses: then the model gets no output."""
    try:
        return show(evaluate(expression))
    except Refused:
        return None


def show(value: int | float) -> str:
    """Integers in full; other numbers to the 15 digits that a double surely holds, so 0.1+0.2 is 0.3 and 170/2 is 85."""
    text = str(value) if isinstance(value, int) else f"{value:.15g}"
    return "0" if text == "-0" else text


def evaluate(expression: str) -> int | float:
    """The value of the expression; Refused with the reason otherwise, and no other exception whatever the text."""
    if len(expression) > MAX_LENGTH:
        raise Refused(f"longer than {MAX_LENGTH} characters")
    text = expression.strip()
    if "'" not in text and '"' not in text:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if not _ALPHABET.fullmatch(text):
        raise Refused(
            "only numbers, + - * / // % **, parentheses, 'text'.count('t') and len('text') are understood"
        )
    try:
        tree = ast.parse(text, mode="eval")
    except (
        SyntaxError,
        ValueError,
        MemoryError,
        RecursionError,
    ) as e:  # the last two: nesting that the parser itself gives up on
        raise Refused("not a well-formed expression") from e
    try:
        return _value(tree.body, MAX_DEPTH)
    except ZeroDivisionError as e:
        raise Refused("division by zero") from e
    except OverflowError as e:
        raise Refused("a number too large") from e


def _value(node: ast.expr, depth: int) -> int | float:
    if depth == 0:
        raise Refused(f"nested deeper than {MAX_DEPTH} operations")
    match node:
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth - 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth - 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, depth - 1), _value(right, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(
                _OPERATIONS[type(op)](_value(left, depth - 1), _value(right, depth - 1))
            )
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
        ):
            return text.count(part)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str() as text)]):
            return len(text)
    raise Refused("only arithmetic, 'text'.count('t') and len('text') are understood")


def _power(base: int | float, exponent: int | float) -> int | float:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and abs(base) > 1
        and exponent * math.log10(abs(base)) > MAX_DIGITS
    ):
        raise Refused(f"a number of more than {MAX_DIGITS} digits")  # known before it is computed
    return _bounded(base**exponent)


def _bounded(value: int | float | complex) -> int | float:
    if isinstance(value, complex):
        raise Refused("a root of a negative number")
    if isinstance(value, int) and abs(value) >= _BOUND:
        raise Refused(f"a number of more than {MAX_DIGITS} digits")
    if not math.isfinite(value):
        raise Refused("a number too large")
    return value
