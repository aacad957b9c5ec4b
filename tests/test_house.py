"""The package's shape: sizes of its files, and which of its parts may know which. ``make lines`` prints the former."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_lab"
MOST_CODE = 7_490  # without serving/; the aim is 4,000, and 450 for data, 350 for GPUs
LONGEST_FILE = 350
# From the ground floor up: a part imports parts before it alone; those of one line do not know each other.
FLOORS = (
    ("errors", "signals"),
    ("files",),
    ("hub", "rundir"),
    ("configs_lookup", "tables"),
    ("loss_table", "plots"),
    ("data", "models"),
    ("training",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
LAZY = ("__init__",)  # names its parts, and loads them when they are asked for


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "serving" not in path.parts
    }


def lines_of_code(path: Path) -> int:
    """Lines that hold code: not blank, not comment, not docstring."""
    source = path.read_text()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(found)


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    known = modules()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("lightning_lab.") for a in node.names if a.name.startswith("lightning_lab.")
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_lab":
            module = (node.module or "").removeprefix("lightning_lab").removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".removeprefix(".")
                yield name if name in known else module


def floor(module: str) -> int:
    part = module.split(".")[0]
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def test_no_file_is_long_and_the_whole_is_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    assert sum(map(lines_of_code, modules().values())) < MOST_CODE


def test_every_part_has_its_floor() -> None:
    assert {m.split(".")[0] for m in modules()} - set(LAZY) - {""} == {part for parts in FLOORS for part in parts}


def test_no_import_goes_upwards_or_sideways() -> None:
    wrong = []
    for module, path in modules().items():
        if module in ("", *LAZY):
            continue
        for other in imported(path):
            if not other or other.split(".")[0] == module.split(".")[0]:
                continue
            if floor(other) >= floor(module):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_there_is_no_circle() -> None:
    graph = {module: set(imported(path)) & set(modules()) for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


if __name__ == "__main__":
    counted = {name or "__init__": lines_of_code(path) for name, path in modules().items()}
    for name, lines in counted.items():
        print(f"{lines:6,}  {name}")
    print(f"{sum(counted.values()):6,}  lines of code, at most {MOST_CODE:,}")
