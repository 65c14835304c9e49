"""Conformance check of a plugin against its contract on a base model; reports each clause as kept or broken.

python -m erasebench check method=uce
python -m erasebench check --config-dir my/conf method=mine
python -m erasebench check task=object evaluator=presence          # an evaluator of the task, by its name there
python -m erasebench check attack=seed_search                      # an attack, on the model that method= erases
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import config
from ..clauses import SAMPLER, Finding, examine
from ..clauses import attacks as of_attacks
from ..clauses import evaluators as of_evaluators
from ..clauses import methods as of_methods
from ..contracts import Attack, Brief, ErasebenchError, Eraser, Evaluator, Prompt
from ..model.model import Model
from ..rows import Row
from ..run import judging
from ..run.session import reason_to_skip
from ..run.specification import Run

PROMPT_COUNT, IMAGE_COUNT = 3, 6  # prompts for methods and attacks; images per split for evaluators


def check(eraser: Eraser, model: Model, brief: Brief, prompts: Sequence[str]) -> list[Finding]:
    """Examine every clause of a method's contract."""
    with tempfile.TemporaryDirectory() as folder:
        return examine(of_methods.Method(eraser, model, brief, prompts, Path(folder)), of_methods.CLAUSES)


def check_evaluator(
    evaluator: Evaluator, prompts: dict[str, Sequence[Prompt]], images: dict[str, Tensor]
) -> list[Finding]:
    """Examine every clause of an evaluator's contract.

    `images` holds the images [N, H, W, 3] of each split's prompts.
    """
    return examine(of_evaluators.Judging(evaluator, prompts, images), of_evaluators.CLAUSES)


def check_attack(
    attack: Attack, model: Model, prompts: Sequence[Prompt], brief: Brief, erases: bool = False
) -> list[Finding]:
    """Examine every clause of an attack's contract. The model is erased if `erases`."""
    with tempfile.TemporaryDirectory() as folder:
        return examine(
            of_attacks.Attacking(attack, model, prompts, brief, Path(folder), erases), of_attacks.CLAUSES
        )


def report(name: str, run: Run, plugin: Any, findings: Sequence[Finding]) -> None:
    """Print the findings. Raises ErasebenchError if a clause is broken."""
    print(f"{name} on {run.source.name}: {type(plugin).__module__}.{type(plugin).__name__}")
    for clause, problem in findings:
        print(f"  {'FAIL' if problem else 'ok  '}  {clause}{': ' + problem if problem else ''}")
    if broken := sum(bool(problem) for _, problem in findings):
        raise ErasebenchError(f"{name} breaks {broken} of {len(findings)} clauses of the contract")


def targets(run: Run) -> list[Prompt]:
    return [p for p in run.plan.prompts if p.split == "target"][:PROMPT_COUNT]


def brief_of(run: Run) -> Brief:
    return replace(run.plan.brief, preserved=run.plan.brief.preserved[:10])


def refuse_unfit(name: str, plugin: Any, run: Run, model: Model) -> None:
    """Raise ErasebenchError if the plugin skips this model: its clauses would say nothing."""
    if reason := reason_to_skip(plugin, model):
        raise ErasebenchError(f"{name} does not fit {run.source.name}: {reason}")


def examine_method(run: Run, model: Model) -> None:
    refuse_unfit(run.method, run.eraser, run, model)
    missing = [f.name for f in fields(run.eraser) if f.name not in run.given]  # type: ignore[arg-type]
    listed = Finding("its config lists every hyperparameter", missing and f"not in the config: {', '.join(missing)}" or "")
    findings = check(run.eraser, model, brief_of(run), [p.text for p in targets(run)])
    report(run.method, run, run.eraser, [listed, *findings])


def examine_evaluator(run: Run, model: Model, name: str) -> None:
    config.refuse_unknown("evaluator of the task", name, sorted(run.plan.evaluators))
    evaluator = run.plan.evaluators[name]
    if evaluator is None or evaluator.judge is None:
        raise ErasebenchError(f"world {run.world} has no judge for {name}")
    prompts: dict[str, Sequence[Prompt]] = {}
    for split in dict.fromkeys(p.split for p in run.plan.prompts):
        every = [p for p in run.plan.prompts if p.split == split]
        prompts[split] = every[:: max(1, len(every) // IMAGE_COUNT)][:IMAGE_COUNT]  # spread over several concepts
    asked = {split: some for split, some in prompts.items() if split in evaluator.splits}
    draw = lambda some: model.sample([p.text for p in some], [p.seed for p in some], SAMPLER).images
    with judging.on(run.judges):
        findings = check_evaluator(evaluator, asked, {split: draw(some) for split, some in asked.items()})
    report(name, run, evaluator, findings)


def examine_attack(run: Run, model: Model, name: str) -> None:
    with ExitStack() as stack:
        if not run.is_base:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run.eraser.fit(model, run.plan.brief, folder, run.seed)
            stack.enter_context(run.eraser.apply(model, folder))
        attack = run.attacks[name]
        refuse_unfit(name, attack, run, model)
        report(name, run, attack, check_attack(attack, model, targets(run), brief_of(run), not run.is_base))


def job(run: Run, evaluators: Sequence[str] = ()) -> list[Row]:
    """Examine the named evaluators, else the attacks, else the method."""
    model = Model.load(run.source, run.device, run.plan.explicit)
    for name in evaluators:
        examine_evaluator(run, model, name)
    for name in run.attacks if not evaluators else ():
        examine_attack(run, model, name)
    if not evaluators and not run.attacks:
        examine_method(run, model)
    return []


def main(words: Sequence[str]) -> int:
    """Return the command's exit code. evaluator= is not an option of a run: the task defines its evaluators."""
    named = [word.partition("=")[2] for word in words if word.startswith("evaluator=")]
    names = [name.strip() for value in named for name in value.strip("[]").split(",")]
    return config.main(partial(job, evaluators=names), [word for word in words if not word.startswith("evaluator=")])
