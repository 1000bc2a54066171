"""Jinja as chat templates expect it, in a sandbox, with a bound on how long a template runs and how much it writes.

Knows nothing of messages or tokens. The bound is for mistakes in an operator's template, not a jail: each pass
through a loop or macro body and each multiplication is counted, single filters and functions are trusted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PASSES = 300_000
"""Passes through loop and macro bodies in one rendering: seconds at worst, and 2,048 messages of 128 parts fit."""

MAX_CHARS = 64 * 1024 * 1024
"""Characters of one rendering, and of one multiplication: more than any context holds."""


class TemplateTooExpensive(jinja2.TemplateError):
    """A template ran into one of the bounds."""


class CompiledTemplate:
    """One chat template, ready to be rendered by any number of threads."""

    def __init__(self, source: str, *, now: Callable[[], datetime] = datetime.now) -> None:
        """`now` is the clock behind `strftime_now`.

        Raises jinja2.TemplateSyntaxError, or whatever Python raises for code that it does not compile.
        """
        self._environment = _Environment(now)
        tree = _count_passes(self._environment.parse(source))
        code = self._environment.compile(tree)
        self._template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    @property
    def reserved(self) -> frozenset[str]:
        """Names that the environment gives to every template."""
        return frozenset(self._environment.globals)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text. Raises jinja2.TemplateError, or whatever an expression of the template raises."""
        self._environment.passes.count = 0
        pieces, num_chars = [], 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_CHARS:
                raise TemplateTooExpensive(f"the chat template wrote more than {MAX_CHARS} characters")
        return "".join(pieces)


class _Passes(threading.local):
    count = 0


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Generator(CodeGenerator):
    """Leaves constant expressions to the rendering, which is bounded; compiling is not."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Frame) -> None:
        if not all(isinstance(option.value, nodes.Const) for option in node.options):
            self.fail("autoescape must be true or false", node.lineno)
        super().visit_EvalContextModifier(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the names that chat templates use."""

    intercepted_binops = frozenset(("*", "**"))
    code_generator_class = _Generator

    def __init__(self, now: Callable[[], datetime]) -> None:
        extensions = [LoopControlExtension, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.passes = _Passes()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)

    def count_pass(self) -> str:
        """Called from every loop and macro body, see `_count_passes`."""
        self.passes.count += 1
        if self.passes.count > MAX_PASSES:
            raise TemplateTooExpensive(f"the chat template looped more than {MAX_PASSES} times")
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses products and powers of a size that no prompt needs."""
        sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        if operator == "*" and not all(isinstance(side, int | float) for side in (left, right)):
            too_big = sizes[0] * sizes[1] > MAX_CHARS
        elif operator == "**":
            too_big = sizes[0] > 2**64 or sizes[1] > 64
        else:
            too_big = max(sizes) > 2**4096
        if too_big:
            raise TemplateTooExpensive(f"the chat template computes too large a value with {operator}")
        return super().call_binop(context, operator, left, right)


def _count_passes(tree: nodes.Template) -> nodes.Template:
    """Put a call of `count_pass` in front of every body that can run more than once."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        call = nodes.Call(nodes.EnvironmentAttribute("count_pass"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
    return tree


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; prompts want plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
