"""The size of the house: python tests/count_lines.py FOLDER..., each with a package `surgery`."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def lines_of(nodes: list[ast.AST]) -> set[int]:
    """The numbers of the lines that these nodes take."""
    return {n for x in nodes for n in range(x.lineno, (x.end_lineno or x.lineno) + 1)}


def count(text: str) -> dict[str, int]:
    """One module: its lines by what they are, its longest function, its imports in functions."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    owners = [x for x in nodes if isinstance(x, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documented = [x for x in owners if ast.get_docstring(x) is not None]
    functions = [x for x in owners if isinstance(x, ast.FunctionDef)]
    docstrings = lines_of([x.body[0] for x in documented])
    imports = lines_of([x for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    bodies = [(x.body[1:] if x in documented else x.body) or x.body for x in functions]
    inside = {
        x for f in functions for x in ast.walk(f) if isinstance(x, ast.Import | ast.ImportFrom)
    }
    return {
        "lines": text.count("\n"),
        "code": len(code - docstrings - imports),
        "imports": len(imports),
        "docstrings": len(docstrings),
        "longest function": max(
            ((f.end_lineno or 0) - b[0].lineno + 1 for f, b in zip(functions, bodies, strict=True)),
            default=0,
        ),
        "imports in functions": len(inside),
    }


def main() -> None:
    """Print the figures of each folder."""
    for folder in map(Path, sys.argv[1:]):
        files = sorted((folder / "surgery").rglob("*.py"))
        found = [count(path.read_text(encoding="utf-8")) for path in files]
        sums = ("lines", "code", "imports", "docstrings", "imports in functions")
        print(folder)
        print(f"  modules {len(files)}, at the root {len(list((folder / 'surgery').glob('*.py')))}")
        print(f"  largest module {max(one['lines'] for one in found)}")
        print(f"  longest function {max(one['longest function'] for one in found)}")
        for name in sums:
            print(f"  {name} {sum(one[name] for one in found)}")


if __name__ == "__main__":
    main()
