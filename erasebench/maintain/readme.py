"""Tables of methods, tasks and attacks for the README.

They come from the first lines of the configuration files.

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
NOTES = ("options", "regress", "reference")  # keys of a description that are not columns
LEFT_OUT = "left out, "  # of a list of runs; the reason follows
# shown first: baselines and null attacks
FIRST = ("none", "checkpoint", "retrained", "negative_prompt", "seed_search", "random_prefix")


def described(path: Path) -> dict[str, str]:
    """Return the `# key: value` lines at the start of a configuration file."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (match := re.match(r"# ([a-z ]+): (.+)", line)):
            break
        found[match[1]] = match[2]
    return found


def listed(folder: Path) -> dict[str, dict[str, str]]:
    """Return choice -> description, in the order of the tables.

    The choices are the configuration files of a folder.
    """
    place = lambda path: (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)
    return {path.stem: described(path) for path in sorted(folder.glob("*.yaml"), key=place)}


def costs(some: Iterable[Row]) -> dict[str, str]:
    """Return method -> seconds and evaluations of its fit.

    The fit is of an airplane in the embedded world; of several runs, the longest counts.
    """
    what = lambda row: (row.world, row.target, row.metric, row.attack)
    wanted = ("mini", "airplane", "fit_unet_calls", "")
    fits = [row for row in some if what(row) == wanted and row.value is not None]
    found = {}
    for row in sorted(fits, key=lambda row: row.fit_seconds or 0):
        if seconds := row.fit_seconds:
            found[row.method] = f"{seconds:.{0 if seconds >= 10 else 1}f} s, {row.value:,.0f}"
    return found


def table(kind: str, folder: Path, fitted: dict[str, str]) -> str:
    """Return a Markdown table with a line for each configuration file.

    A file without a description, a variant of another one, has no line. Raises ErasebenchError for a description
    that is no column.
    """
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
    """Return the text with each table between its marks.

    Raises ErasebenchError if a mark is missing.
    """
    for kind, content in tables.items():
        pattern = re.compile(rf"(<!-- {kind}s -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ErasebenchError(f"no <!-- {kind}s --> and <!-- end --> to put the table between")
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


def tables(reference: Path | None = None) -> dict[str, str]:
    """Return kind -> its table, for the configuration in use.

    Costs are included if the reference is present.
    """
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
