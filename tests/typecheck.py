"""Shape annotations checked at run time, for every function of a package that has one.

`check` installs an import hook. Functions without array annotations stay as they are: what they say of wrong arguments
is theirs, and tested; and wrapping the small ones, which tracing calls by the ten thousand, would double its time.
"""

import ast
import builtins
import inspect
import re
import sys
from dataclasses import is_dataclass
from importlib.machinery import PathFinder, SourceFileLoader

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

ARRAY = re.compile(r"\b(Bool|Num|Real|Shaped|Integer|U?Int\d*|Float\d*)\[")
MARK = "__check_shapes__"  # of `shapes` among the builtins
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shapes(thing):
    """Check calls of a function, or the fields of a dataclass, whose annotations name array shapes."""
    annotated = thing.__init__ if inspect.isclass(thing) and is_dataclass(thing) else thing
    annotations = getattr(annotated, "__annotations__", {}).values()
    found = any(ARRAY.search(str(a)) for a in annotations)
    return jaxtyped(thing, typechecker=_typechecker) if found else thing


class _Decorate(ast.NodeTransformer):
    """`shapes` on classes, their methods and the functions of a module; on inner functions that spell out an array."""

    inside = 0

    def visit_ClassDef(self, node):
        outer, self.inside = self.inside, 0
        self.generic_visit(node)
        self.inside = outer
        node.decorator_list.insert(0, self._mark(node))  # outermost: behind @dataclass
        return node

    def visit_FunctionDef(self, node):
        self.inside += 1
        self.generic_visit(node)
        self.inside -= 1
        arguments = [node.args.vararg, node.args.kwarg, *node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        written = [a.annotation for a in arguments if a and a.annotation] + [node.returns] * bool(node.returns)
        if written and (not self.inside or any(ARRAY.search(ast.unparse(a)) for a in written)):
            node.decorator_list.append(self._mark(node))  # innermost: below custom derivatives and jit
        return node

    def visit_Expr(self, node):  # neither this nor what follows holds a definition
        return node

    visit_Assign = visit_AnnAssign = visit_AugAssign = visit_Return = visit_Raise = visit_Assert = visit_Expr

    def _mark(self, node):
        return ast.copy_location(ast.Name(MARK, ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname):  # never from or to the cache of bytecode, which other processes share
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader and b"jaxtyping" in spec.loader.get_data(spec.origin):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check(*packages):
    """Check the shapes of these packages, from their next import on."""
    setattr(builtins, MARK, shapes)
    sys.meta_path.insert(0, _Finder(packages))
