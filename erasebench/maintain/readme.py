"""What there is: methods, tasks and attacks, as the first lines of their configuration files describe them.

python -m erasebench readme                      # prints the tables
python -m erasebench readme --write README.md    # puts them between the marks `<!-- methods -->` and `<!-- end -->`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ..contracts import ErasebenchError
from ..report import row_table
from ..rows import Row, replace_file

COLUMNS = {
    "method": ("paper", "changes", "needs", "here", "to fit"),
    "task": ("erases", "keeps", "metrics"),
    "attack": ("paper", "sees", "images a prompt"),
}
NOTES = ("options", "regress", "reference")  # of a description, and no columns
LEFT_OUT = "left out, "  # of a list of runs; why follows
# what is no method or attack
FIRST = ("none", "checkpoint", "retrained", "negative_prompt", "seed_search", "random_prefix")


def described(path: Path) -> dict[str, str]:
    """`# key: value` lines at the start of a configuration file."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (match := re.match(r"# ([a-z ]+): (.+)", line)):
            break
        found[match[1]] = match[2]
    return found


def listed(folder: Path) -> dict[str, dict[str, str]]:
    """Choice of a folder -> its description, in the order of the tables."""
    place = lambda path: (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)
    return {path.stem: described(path) for path in sorted(folder.glob("*.yaml"), key=place)}


def costs(some: Iterable[Row]) -> dict[str, str]:
    """Method -> seconds and evaluations of its fit of an airplane in the embedded world; of several runs the longest."""
    what = lambda row: (row.world, row.target, row.metric, row.attack)
    wanted = ("mini", "airplane", "fit_unet_calls", "")
    fits = [row for row in some if what(row) == wanted and row.value is not None]
    found = {}
    for row in sorted(fits, key=lambda row: row.fit_seconds or 0):
        if seconds := row.fit_seconds:
            found[row.method] = f"{seconds:.{0 if seconds >= 10 else 1}f} s, {row.value:,.0f}"
    return found


def table(kind: str, folder: Path, fitted: dict[str, str]) -> str:
    """Markdown, a line for each configuration file that describes itself; a variant of another does not."""
    columns = COLUMNS[kind]
    lines = [f"| {' | '.join([kind, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for choice, said in listed(folder / kind).items():
        if unknown := set(said) - {*columns, *NOTES}:
            path = folder / kind / f"{choice}.yaml"
            raise ErasebenchError(f"{path}: its first lines describe {sorted(unknown)[0]!r}, which is no column")
        if not set(said) & set(columns):
            continue
        said["to fit"] = fitted.get(choice, "")
        name = f"`{choice}`" + (f" ({said['options']})" if "options" in said else "")
        cells = [name, *(said.get(column, "") for column in columns)]
        shown = (f" {cell} ".replace("|", "\\|") if cell else " " for cell in cells)
        lines.append(f"|{'|'.join(shown)}|")
    return "\n".join(lines)


def written(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its marks. Raises ErasebenchError where a mark is missing."""
    for kind, content in tables.items():
        pattern = re.compile(rf"(<!-- {kind}s -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ErasebenchError(f"no <!-- {kind}s --> and <!-- end --> to put the table between")
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


def tables(reference: Path | None = None) -> dict[str, str]:
    """kind -> its table, of the configuration in use; costs where the reference is there."""
    from .. import conf, results

    fitted = costs(row_table.read_all(reference or Path(next(iter(results.__path__)), "reference")))
    return {kind: table(kind, Path(next(iter(conf.__path__))), fitted) for kind in COLUMNS}


def report(path: Path | None) -> int:
    """Print the tables or write them into a file; returns an exit code."""
    try:
        made = tables()
        if path is None:
            print(*made.values(), sep="\n\n")
        else:
            replace_file(path, written(path.read_text(encoding="utf-8"), made).encode(), "")
    except (ErasebenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
