"""Jinja for templates of others: no code, no attribute that is unsafe, bounded time and size."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from time import monotonic
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

from headway.config import UsageError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 24
"""Most characters of a rendered conversation, and of what an operation of a template makes."""

_UNTIL = "_headway_until"


def compile_template(source: str) -> "Template":
    """Return a template in the dialect of Transformers: Jinja's immutable sandbox with
    `trim_blocks`, `lstrip_blocks`, `break` and `continue`, the block `generation`, `tojson` as JSON
    is written elsewhere, `raise_exception` and `strftime_now`.

    Raises: UsageError for what is no Jinja, and where Jinja is not installed."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import EvalContext
        from jinja2.runtime import Context
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    except ImportError:
        raise UsageError(
            "chat templates need Jinja, which is not installed; pip install 'headway[serve]'"
        ) from None

    class Generation(Extension):
        """The block `generation`, which says what an assistant wrote: its body as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        """Checks the time in every loop, and the size of what operators and calls make."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                check = nodes.EnvironmentAttribute("check_time")
                call = nodes.Call(check, [nodes.ContextReference()], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
            return tree

        def check_time(self, context: Any) -> None:
            """Raise SecurityError when the time of a rendering is over."""
            if monotonic() > context.parent[_UNTIL]:
                raise SecurityError(f"it takes more than {MAX_SECONDS:g} s")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Evaluate an operator unless its result would be huge."""
            self.check_time(context)
            match operator, left, right:
                case "*", int() | float(), int() | float():
                    pass
                case "*", _, int():
                    _check_size(len(left) * right)
                case "*", int(), _:
                    _check_size(left * len(right))
                case "**", _, _:
                    _check_size(abs(left) + abs(right))
                    if right > 64:
                        _check_size(MAX_CHARACTERS + 1)
                case "%", str(), _:
                    _check_widths(left)
            return super().call_binop(context, operator, left, right)

        def getattr(self, obj: Any, attribute: str) -> Any:
            """Return an attribute; a text's `format` only with small widths."""
            if isinstance(obj, str) and attribute.startswith("format"):
                _check_widths(obj)
            return super().getattr(obj, attribute)

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            """Call a function or method unless it would make a huge text or list."""
            self.check_time(context)
            match obj:
                case BuiltinMethodType() if isinstance(obj.__self__, str | bytes | list):
                    _check_arguments(args, kwargs)
            return super().call(context, obj, *args, **kwargs)

    def bounded(function: Callable) -> Callable:
        """Return a filter that refuses huge numbers beside the value that it filters."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            takes_environment = isinstance(args[0], jinja2.Environment | EvalContext | Context)
            _check_arguments(args[2 if takes_environment else 1 :], kwargs)
            return function(*args, **kwargs)

        return call

    def _check_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int | float):
                _check_size(value)

    def _check_size(n: float) -> None:
        if n > MAX_CHARACTERS:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS:,} characters")

    def _check_widths(text: str) -> None:
        for digits in re.findall(r"\d{6,}", text):
            _check_size(int(digits[:20]))

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def formatted(text: str, *args: Any, **kwargs: Any) -> str:
        _check_widths(text)
        return text % (kwargs or args)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters |= {"tojson": to_json, "format": formatted}
    for name, function in environment.filters.items():
        environment.filters[name] = bounded(function)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"the chat template is no Jinja: line {error.lineno}: {error}") from None
    except RecursionError:
        raise UsageError("the chat template is nested too deep") from None


def render(template: "Template", variables: Mapping[str, Any]) -> str:
    """Return the text of a template. Raises UsageError, one line, where the template raises an
    exception, fails, or is over its bounds."""
    from jinja2 import TemplateError

    texts, size = [], 0
    try:
        for text in template.generate({**variables, _UNTIL: monotonic() + MAX_SECONDS}):
            texts.append(text)
            size += len(text)
            if size > MAX_CHARACTERS:
                raise UsageError(
                    f"the chat template writes more than {MAX_CHARACTERS:,} characters"
                )
    except UsageError:
        raise
    except TemplateError as error:
        raise UsageError(f"the chat template refuses this: {_one_line(error)}") from None
    except RecursionError:
        raise UsageError("the chat template fails: messages or tools are nested too deep") from None
    except Exception as error:  # whatever an operation of a template on a user's values raises
        kind = type(error).__name__
        raise UsageError(f"the chat template fails: {kind}: {_one_line(error)}") from None
    return "".join(texts)


def _one_line(error: Exception) -> str:
    """Return the message of an error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or "no reason given"
