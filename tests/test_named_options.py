"""Every option that a document, a configuration's comment or a message names composes."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from erasebench import config
from erasebench.analysis import schedule
from erasebench.defaults import complete

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "erasebench/mini/README.md"]
SOURCES = [f for folder in ("erasebench", "methods", "evaluators") for f in sorted((ROOT / folder).rglob("*.py"))]
# an option: dotted words before an equals sign, of one's own word and not of a longer one; with + it need not exist
DOTTED = re.compile(r"(?<![\w.+/-])([a-z_]\w*(?:\.\w+)+)=(?!=)")
PLAIN = re.compile(r'(?<![\w.+/~("-])([a-z_]\w*)=(?!=)')  # neither an argument of a call nor a name in quotes
CHOSEN = re.compile(r"(?<![\w.+/-])(method|model|task|experiment|executor)=([\w,]+)")
TOP = yaml.safe_load((CONF / "config.yaml").read_text())
# words before an equals sign that are options of other commands, of code, or of a formula in a document
OTHERS = {"data", "out", "PYTHON", "hub", "revision", "evaluator", "profile"}
COSTS = {"judges.clip"}  # keys of a plan's costs that look like options of a run


def messages(file: Path) -> list[str]:
    """The strings of a module that are no docstrings of code, with the module's own constants filled in."""
    tree = ast.parse(file.read_text())
    known = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.FormattedValue):
            return known.get(getattr(node.value, "id", ""), "\0")
        return "".join(map(text, node.values))

    is_text = lambda node: isinstance(node, ast.Constant) and isinstance(node.value, str)
    return [text(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) or is_text(node)]


def named() -> dict[str, Path]:
    """Dotted option -> a file that names it."""
    found: dict[str, Path] = {}
    for file in [*DOCUMENTS, *sorted(CONF.rglob("*.yaml"))]:
        found |= {key: file for key in DOTTED.findall(file.read_text(encoding="utf-8"))}
    for file in SOURCES:
        for text in messages(file):
            found |= {key: file for key in DOTTED.findall(text)}
    found = {key: file for key, file in found.items() if key not in COSTS}
    roots = {*TOP, "model", "task", "method", "attack", "world", "executor"} - {"defaults", "hydra"}
    return {key: file for key, file in found.items() if key.partition(".")[0] in roots}


def owners(group: str, name: str) -> list[str]:
    """The choices of a group that have a key."""
    return [f.stem for f in sorted((CONF / group).glob("*.yaml")) if name in config.keys_of(f.parent, f.stem)]


def composing(key: str) -> list[str]:
    """The choices with which an option is there."""
    group, name = key.split(".")[:2]
    if group in ("method", "task"):
        return [f"{group}={(owners(group, name) or ['none'])[0]}", "model=sd14"]
    if group == "attack":
        return [f"attack={name}"]
    return ["executor=ray"] if group == "executor" else ["model=sd14"]


def test_dotted_options_compose():
    together: dict[tuple[str, ...], list[str]] = {}
    for key in named():
        together.setdefault(tuple(composing(key)), []).append(key)
    assert {"world.judges.objects.path", "world.judges.identity.sha256"} <= set(together[("model=sd14",)])
    with initialize_config_module("erasebench.conf", version_base="1.3"):
        for choices, keys in together.items():
            try:
                compose("config", [*choices, *(f"{key}=null" for key in keys)])
            except Exception:
                for key in keys:  # which of them it is
                    try:
                        compose("config", [*choices, f"{key}=null"])
                    except Exception as error:
                        try:
                            compose("config", ["model=mini", f"{key}=null"])
                        except Exception:
                            pytest.fail(f"{named()[key]} names {key}=: {str(error).splitlines()[0]}")


def test_plain_options_are_there():
    """In documents: of the configuration, of a method, an attack, a task, a launcher or a plan."""
    known = {*TOP, *yaml.safe_load(schedule.COSTS.read_text()), *config.GROUPS, *OTHERS}
    for group in ("method", "task", "attack"):
        for file in (CONF / group).glob("*.yaml"):
            content = complete(yaml.safe_load(file.read_text()) or {})
            known |= {*content, *(content.get(file.stem) or {} if group == "attack" else ())}
    for file in DOCUMENTS:
        for span in re.findall(r"`([^`\n]+)`|^(python -m .*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            for name in PLAIN.findall("".join(span)):
                assert name in known, f"{file.name} names {name}= in {''.join(span)!r}"


def test_choices_exist():
    for file in [*DOCUMENTS, *SOURCES]:
        texts = messages(file) if file.suffix == ".py" else [file.read_text(encoding="utf-8")]
        for group, names in CHOSEN.findall("\n".join(texts)):
            for name in filter(None, names.split(",")):
                own = "mine" in name or name in ("night", "more", "object_dark")  # of docs/extending.md
                assert own or (CONF / group / f"{name}.yaml").is_file(), f"{file.name} names {group}={name}"
