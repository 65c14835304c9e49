"""Conformance: runs an eraser through the contract on a base model, and says what holds and what does not.

python -m erasebench.check method=uce
python -m erasebench.check --config-dir my/conf method=mine
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

from . import config
from .contracts import Brief, ErasebenchError, Eraser, Sampler
from .model import Model, weights_digest
from .rows import Row
from .run import Run, check_artifact, not_finite_in
from .store import digest, sha256_file

PROMPT_COUNT, SAMPLER = 3, Sampler("ddim", 5, 4.0)


def check(eraser: Eraser, model: Model, brief: Brief, prompts: list[str]) -> list[tuple[str, str]]:
    """(what was checked, "" or what is wrong) for every clause of the contract."""
    results: list[tuple[str, str]] = []
    seeds = list(range(len(prompts)))
    before, openings = (
        weights_digest(model.unet, model.text_encoder, model.vae),
        (model.guidance, model.guard, model.around, dict(model.unet.attn_processors)),
    )
    base = model.sample(prompts, seeds, SAMPLER)

    def clause(name: str, test: Callable[[], str | None]) -> None:
        try:
            problem = test() or ""
        except Exception as error:  # a plugin may raise anything; here that is the finding
            problem = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        results.append((name, problem))

    def untouched() -> str | None:
        if weights_digest(model.unet, model.text_encoder, model.vae) != before:
            return "weights differ from the base"
        now = (model.guidance, model.guard, model.around, dict(model.unet.attn_processors))
        if now != openings or model.is_changed:
            return "guidance, guard or attention processors were left changed"
        return None

    def description() -> str | None:
        if not is_dataclass(eraser) or not type(eraser).__dataclass_params__.frozen:
            return "not a frozen dataclass"
        digest(eraser)
        if not isinstance(getattr(type(eraser), "version", None), int):
            return "no version: ClassVar[int]"
        return None if isinstance(eraser, Eraser) else "fit or apply is missing"

    clause("is a frozen dataclass with a version, and its parameters have a canonical text", description)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        artifact, again = Path(first), Path(second)
        clause("fit runs", lambda: eraser.fit(model, brief, artifact, 0))
        if results[-1][1]:
            return results
        clause("fit leaves the base as it was", untouched)
        clause("fit writes safetensors and JSON only", lambda: check_artifact(artifact))

        def repeats() -> str | None:
            eraser.fit(model, brief, again, 0)
            names = sorted(str(f.relative_to(artifact)) for f in artifact.rglob("*") if f.is_file())
            differ = [
                n for n in names if not (again / n).is_file() or sha256_file(artifact / n) != sha256_file(again / n)
            ]
            return f"{', '.join(differ)} differ between two fits with one seed" if differ else None

        def finite() -> str | None:
            return f"{problem} is not finite" if (problem := not_finite_in(artifact)) else None

        clause("fit is deterministic in its seed", repeats)
        clause("what fit learnt is finite", finite)

        def erased(texts: list[str], which: list[int]):
            with eraser.apply(model, artifact):
                return model.sample(texts, which, SAMPLER)

        def changes() -> str | None:
            sampled = erased(prompts, seeds)
            same = torch.equal(sampled.images, base.images)
            if getattr(eraser, "is_base", False):
                return None if same else "the base must change nothing"
            return "no image changed" if same else None

        def twice() -> str | None:
            return (
                None
                if torch.equal(erased(prompts, seeds).images, erased(prompts, seeds).images)
                else "two applications differ"
            )

        def alone() -> str | None:
            together = erased(prompts, seeds).images.int()
            for i in seeds:
                gap = (erased([prompts[i]], [i]).images[0].int() - together[i]).abs()
                # fp32 kernels differ with the batch; more than a few grey levels on a few pixels is the method's doing
                if gap.max() > 4 or (gap > 0).float().mean() > 0.02:
                    return f"image {i} depends on its neighbours (largest difference {int(gap.max())} grey levels)"
            return None

        def white_box() -> str | None:
            with eraser.apply(model, artifact):
                ids = model.tokenize(prompts[:1])
                embeds = model.text_encoder.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
                context, z = model.encode(ids=ids, token_embeds=embeds), model.noise([0])
                model.guided_eps(z, 500, context, 3.0, model.begin(context, z)).square().sum().backward()
            return None if embeds.grad is not None and embeds.grad.abs().sum() > 0 else "no gradient reaches the prompt"

        clause("the erased model draws the concept differently", changes)
        clause("apply is deterministic", twice)
        clause("an image does not depend on its neighbours in the batch", alone)
        clause("attacks get gradients through guidance", white_box)
        clause("leaving apply gives the base back, bit by bit", untouched)
    return results


def job(run: Run) -> list[Row]:
    print(f"{run.method} on {run.source.name}: {type(run.eraser).__module__}.{type(run.eraser).__name__}")
    missing = [f.name for f in fields(run.eraser) if f.name not in run.given]
    results = [("its config lists every hyperparameter", f"not in the config: {', '.join(missing)}" if missing else "")]
    model = Model.load(run.source, run.device, run.plan.explicit)
    if hasattr(run.eraser, "skip") and (reason := run.eraser.skip(model)):
        raise ErasebenchError(f"{run.method} does not fit {run.source.name}: {reason}")
    prompts = [p.text for p in run.plan.prompts if p.split == "target"][:PROMPT_COUNT]
    brief = replace(run.plan.brief, preserved=run.plan.brief.preserved[:10])
    results += check(run.eraser, model, brief, prompts)
    for name, problem in results:
        print(f"  {'FAIL' if problem else 'ok  '}  {name}{': ' + problem if problem else ''}")
    if broken := sum(bool(problem) for _, problem in results):
        raise ErasebenchError(f"{run.method} breaks {broken} of {len(results)} clauses of the contract")
    return []


if __name__ == "__main__":
    sys.exit(config.main(job, sys.argv[1:]))
