"""Where a source file can be changed into a wrong one, and how: one small change per site."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_COMPARISON: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Site:
    """One change: ``new`` in place of the bytes ``start`` to ``end`` of the file ``path``."""

    path: str
    """from the repository's root, with slashes"""
    scope: str
    """the function or class it is in, "" for the module"""
    kind: str
    start: int
    end: int
    old: str
    new: str
    line: str
    """the first of the lines that it stands in"""
    number: int
    """counts equal changes of equal lines in one scope"""
    lines: tuple[int, int] | None
    """first and last of those that a test must run to see it; None: any of the file, it is run on import"""

    @property
    def id(self) -> str:
        """The same after changes elsewhere in the file."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        place = "" if old.startswith(self.line) else f" in {self.line}"
        return f"{self.path}:{self.scope}:{self.kind}:{old} -> {new}{place}:{self.number}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]


def sample(sites: Iterable[Site], count: int, seed: int) -> list[Site]:
    """``count`` of the sites. The place of each in the draw is its own: changes elsewhere leave it."""
    return sorted(sites, key=lambda s: hashlib.sha256(f"{seed}:{s.id}".encode()).digest())[:count]


def find(path: str, source: bytes) -> list[Site]:
    """Every site of a file."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    return finder.sites


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.sites: list[Site] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._lines: tuple[int, int] | None = None
        self._default = False
        self._seen: Counter[str] = Counter()

    # -- where we are --------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        """As ever; inside a function, remembers where the innermost statement begins."""
        if not (isinstance(node, ast.stmt) and self._lines is not None):
            super().visit(node)
            return
        before, self._lines = self._lines, (node.lineno, node.lineno)
        super().visit(node)
        self._lines = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self._lines
        self._scope.append(node.name)
        self._lines = (node.body[0].lineno, node.end_lineno or node.lineno)
        self._default = True
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._default = False
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()
        self._lines = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    # -- what is left as it is -----------------------------------------------------------------------------

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts; and Python 3.11 does not say where their parts stand."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """For the type checker."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    # -- what is changed -----------------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = (ast.JoinedStr, ast.List, ast.Tuple)
        is_text = any(
            isinstance(side, texts) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in (node.left, node.right)
        )
        if type(node.op) in _ARITHMETIC and not is_text:
            self._replace(node, "arithmetic", ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            self._replace(
                node, "arithmetic", ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)
            )
        self._remove(node)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operation = type(node.ops[0])
        if operation in _COMPARISON:
            ops = [_COMPARISON[operation](), *node.ops[1:]]
            self._replace(node, "comparison", ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._replace(node, "boolean", ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(node, "boolean", node.operand)
        elif isinstance(node.op, ast.USub):
            self._replace(node, "arithmetic", node.operand)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._replace(node, "branches", ast.IfExp(node.test, node.orelse, node.body))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value, new = node.value, None
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, int):
            new = value + 1
        elif isinstance(value, float):
            new = 2 * value or 1.0
        if new is not None:
            self._replace(node, "default" if self._default else "constant", ast.Constant(new))

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self._replace(bound, "slice", ast.BinOp(bound, ast.Add(), ast.Constant(1)))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        first = node.args[:2]
        if len(first) == 2 and not any(isinstance(argument, ast.Starred) for argument in first):
            swapped = [first[1], first[0], *node.args[2:]]
            if ast.dump(first[0]) != ast.dump(first[1]):
                self._replace(node, "arguments", ast.Call(node.func, swapped, node.keywords))
        for part in (node.func, *node.args, *node.keywords):
            if getattr(part, "arg", None) != "strict":  # of zip, an assertion
                self.visit(part)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._remove(node)
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Subscript):
            self._remove(node)
        if not (isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"):
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self._remove(node)
        self.generic_visit(node)

    # -- writing it down -----------------------------------------------------------------------------------

    def _remove(self, node: ast.stmt) -> None:
        self._add(node, "removal", "pass")

    def _replace(self, node: ast.AST, kind: str, other: ast.AST) -> None:
        text = ast.unparse(ast.fix_missing_locations(other))
        self._add(node, kind, text if isinstance(other, (ast.stmt, ast.Constant)) else f"({text})")

    def _add(self, node: ast.AST, kind: str, new: str) -> None:
        line, column, last, end_column = (
            getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")
        )
        start, end = self._starts[line - 1] + column, self._starts[last - 1] + end_column
        lines = self._lines if self._default or self._lines is None else (min(self._lines[0], line), last)
        old = self.source[start:end].decode()
        text = self.source[self._starts[line - 1] : self._starts[line]].decode().strip()
        site = Site(self.path, ".".join(self._scope), kind, start, end, old, new, text, 0, lines)
        number = self._seen[site.id]
        self._seen[site.id] += 1
        self.sites.append(Site(**{**vars(site), "number": number}))
