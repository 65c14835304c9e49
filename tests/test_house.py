"""The limits of the house: short functions, few arguments, no circle of imports, plain first sentences."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(f for folder in ("erasebench", "methods", "evaluators", "tests") for f in (ROOT / folder).rglob("*.py"))
LINES, ARGUMENTS, WORDS = 60, 7, 12


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def count_lines(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def count_arguments(function: ast.FunctionDef) -> int:
    """All that it takes; self and cls are not counted."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def find_beyond(count, limit: int) -> set[str]:
    """Functions of which count(function) is above a limit."""
    return {
        f"{file.relative_to(ROOT).as_posix()}: {function.name}"
        for file in FILES
        for function in functions(parse(file))
        if count(function) > limit
    }


def list_imports(tree: ast.Module, package: str) -> set[str]:
    """Dotted names that a module imports when it is imported itself; `package` is the one that it lies in."""
    found, open_nodes = set(), [tree]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            open_nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
        open_nodes += ast.iter_child_nodes(node)
    return found


def read_graph() -> dict[str, set[str]]:
    """Module of the package -> modules of it that are imported with it. What a package's __init__ does is its own."""
    modules = {}
    for file in FILES:
        if file.is_relative_to(ROOT / "erasebench"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for name, file in modules.items():
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        imported = list_imports(parse(file), package) & set(modules)
        graph[name] = {other for other in imported - {name} if not name.startswith(f"{other}.")}
    return graph


def test_no_function_is_longer_than_sixty_lines():
    assert find_beyond(count_lines, LINES) == set()


def test_no_function_has_more_than_seven_arguments():
    assert find_beyond(count_arguments, ARGUMENTS) == set()


def first_sentence(node: ast.AST) -> str:
    """First sentence of a docstring, or "" without one."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.!?:;])\s", text)[0]


def is_plain(sentence: str) -> bool:
    """Whether a sentence has at most twelve words and no clause in place of a noun."""
    return len(sentence.split()) <= WORDS and not re.search(r"\b(what|who|whom|whatever|such as)\b", sentence, re.I)


@pytest.mark.parametrize(
    "sentence, expected",
    [("Return the mean.", True), ("What a fit learnt.", False), ("Names, such as cat.", False), ("a " * 13, False)],
)
def test_a_plain_sentence(sentence, expected):
    assert is_plain(sentence) is expected


def test_docstrings_begin_with_a_plain_sentence():
    with_text = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    verbs = ROOT / "erasebench" / "cli"  # the docstring of a verb's module is the paragraph of its help
    found = [
        f"{file.relative_to(ROOT)}: {sentence}"
        for file in FILES
        if not file.is_relative_to(ROOT / "tests")
        for node in ast.walk(parse(file))
        if isinstance(node, with_text) and not (isinstance(node, ast.Module) and file.parent == verbs)
        if not is_plain(sentence := first_sentence(node))
    ]
    assert not found, found


def test_no_modules_import_each_other():
    graph = read_graph()
    assert "erasebench.store.local" in graph["erasebench.run.run"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from .store import Store", {"erasebench.store", "erasebench.store.Store"}),
        ("from . import stats", {"erasebench", "erasebench.stats"}),
        ("try:\n    import erasebench.rows\nexcept ImportError: pass", {"erasebench.rows"}),
        ("class A:\n    from ..store import Store", {"erasebench.store", "erasebench.store.Store"}),
        ("def f():\n    from . import store", set()),
        ("if TYPE_CHECKING:\n    from . import store", set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import a", {"a"}),
    ],
)
def test_what_counts_as_an_import(source, expected):
    package = "erasebench.mini" if ".." in source else "erasebench"
    assert list_imports(ast.parse(source), package) == expected


@pytest.mark.parametrize(
    "source, lines, arguments",
    [
        ("def f(a, /, b, *c, d=1, **e):\n    return a\n", 2, 5),
        ("class A:\n    def f(self, a):\n        pass", 2, 1),
        ("class A:\n    @classmethod\n    async def f(cls): pass", 1, 0),
    ],
)
def test_what_is_counted_of_a_function(source, lines, arguments):
    (function,) = functions(ast.parse(source))
    assert (count_lines(function), count_arguments(function)) == (lines, arguments)
