"""The Jinja environment of chat templates: no way out of the sandbox, and bounds on time and memory.

Jinja's own sandbox bounds neither. Here whatever can make something large (operators, literals, filters,
calls) goes through the meter, and each round of a loop looks at the clock.
"""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment, pass_eval_context
from jinja2.visitor import NodeTransformer

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.meter import meter, out_of_bounds

_STRING_METHODS = """
capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit
islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
""".split()  # noqa: SIM905 (fifty quoted words are harder to read)
# No chat template needs these, and each would need a bound of its own.
_LEFT_OUT = ("pprint", "random", "urlize", "wordwrap", "xmlattr")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here only what is in it counts."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Metering(NodeTransformer):
    """Sends what Jinja would compile to bare Python through the environment, where it is metered."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("tick"), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("joined", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through("literal", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("literal", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("literal", node) if node.ctx == "load" else node


def _through(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders chat templates, inside `metered`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        extensions: list[str | type[Extension]] = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        own: dict[str, Callable[..., Any]] = {
            "format": _format,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "sum": _sum,
            "tojson": _tojson,
        }
        own |= {name: _narrow(self.filters[name]) for name in ("batch", "center", "round", "slice")}
        kept = {name: function for name, function in self.filters.items() if name not in _LEFT_OUT}
        self.filters = {name: _accounted(function) for name, function in (kept | own).items()}
        self.tests = {name: _accounted(function) for name, function in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, at most 100000
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    @staticmethod
    def tick() -> bool:
        """One more round of a loop; `call` accounts for it."""
        return True

    @staticmethod
    def literal(value: Any) -> Any:
        """A list, tuple or dict written in the template; `call` accounts for it."""
        return value

    @staticmethod
    def joined(*values: Any) -> str:
        """The operator ~; `call` accounts for the result."""
        meter().weigh(values)
        return "".join(map(str, values))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block."""
        kept, weight = [], 0
        for piece in pieces:
            weight += len(piece)
            meter().expect(weight)
            kept.append(piece)
        meter().spend(weight + len(kept))
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of strings only harmless methods, of bytes and numbers none (`(1).to_bytes(10**10)`)."""
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        return not isinstance(obj, (bytes, int, float)) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja would print nothing and fail only on use; a template that tries this fails at once."""
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is out of reach of a template")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with the sandbox's rules and metered, None for other values."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            meter().expect_format(value.__self__, (args, kwargs))
            return function(*args, **kwargs)

        return checked

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in the template, metered."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            args = _checked_arguments(owner, function.__name__, args)
        elif isinstance(function, Macro):
            meter().weigh((args, kwargs))  # in the macro they are the values `varargs` and `kwargs`
        return meter().made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A binary operator, metered."""
        match operator, left, right:
            case "**", int(), int():
                meter().expect_bits(left.bit_length() * abs(right))
            case "*", int(), int():
                meter().expect_bits(left.bit_length() + right.bit_length())
            case "*", int(), _:
                meter().expect(left * meter().weigh(right))
            case "*", _, int():
                meter().expect(meter().weigh(left) * right)
            case "%", str(), _:
                meter().expect_percent(left, right)
        return meter().made(super().call_binop(context, operator, left, right))


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # its values are metered one by one, not as one text


def _raise_exception(message: str) -> None:
    raise DsoptError(f"the chat template refuses the messages: {' '.join(str(message).split())}")


def _checked_arguments(text: str, method: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match method, arguments:
        case "replace", (str(old), str(new), *_):
            _expect_replaced(text, old, new)
        case "join", (pieces,):
            pieces = list(pieces)
            meter().expect(len(text) * len(pieces) + meter().weigh(pieces))
            return (pieces,)
        case (("center" | "ljust" | "rjust" | "zfill"), _):
            meter().expect_widths(arguments)
    return arguments


def _expect_replaced(text: str, old: str, new: str) -> None:
    meter().expect(len(text) + text.count(old) * len(new))


def _accounted(function: Any) -> Callable[..., Any]:
    @wraps(function)  # with the attributes by which Jinja knows what to pass
    def accounted(*args: Any, **kwargs: Any) -> Any:
        return meter().made(function(*args, **kwargs))

    return accounted


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def narrow(value: Any, *args: Any, **kwargs: Any) -> Any:
        meter().expect_widths([*args, *kwargs.values()])
        return function(value, *args, **kwargs)

    return narrow


def _format(text: Any, *args: Any, **kwargs: Any) -> Any:
    meter().expect_percent(str(text), (args, kwargs))
    return FILTERS["format"](text, *args, **kwargs)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    columns = len(width) if isinstance(width, str) else width
    meter().expect(len(text) + (1 + len(text.splitlines())) * columns)
    return FILTERS["indent"](text, width, first, blank)


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Any:
    items = list(value)
    meter().expect(len(items) * len(str(d)) + meter().weigh(items))
    return FILTERS["join"](context, items, d, attribute)


@pass_eval_context
def _replace(context: EvalContext, text: Any, old: str, new: str, count: int | None = None) -> Any:
    _expect_replaced(str(text), str(old), str(new))
    return FILTERS["replace"](context, text, old, new, count)


@pass_environment
def _sum(environment: Sandbox, value: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise out_of_bounds("sums what is not numbers")  # lists would be copied once for each list
    return FILTERS["sum"](environment, value, attribute, start)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it, not escaped for HTML."""
    meter().weigh(value)
    widths = [indent, *(separators or ())]
    meter().expect_widths(len(width) if isinstance(width, str) else width for width in widths)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return Sandbox.concat(encoder.iterencode(value))
