"""Command line -> Run.

Only this module and config_sources.py know Hydra's configurations; heavy imports wait until a run is certain.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config_sources as config_sources  # Hydra reads values by block from here on
from . import interrupt
from .arguments import check_grammar, check_lists, check_plugins, check_values, explained, flags_first
from .contracts import ErasebenchError, HasPublishedSurrogates, Missing
from .defaults import complete
from .options import ALONE, CHOICES, GROUPS, repeatable
from .options import ELSEWHERE as ELSEWHERE
from .options import again as again
from .progress import track
from .redaction import Formatter, redact
from .report.tables import show
from .store.local import home

if typing.TYPE_CHECKING:
    from .contracts import Evaluator, Plan, Sampler
    from .model.source import Source
    from .own_concept import Asked, Own
    from .rows import Row
    from .run.specification import Run
    from .toolbox.inversion import Pictured

log = logging.getLogger("erasebench")
DryJob = Callable[[list["Run"], list[tuple[str, str, str]], float | None], None]
RAISES = "HYDRA_FULL_ERROR"  # makes Hydra raise errors instead of printing them
PUBLISHED = "published"  # surrogate=published: the surrogate that the method's authors use
PACKAGE_TASKS = "erasebench.tasks."
UNSET = {"n": None, "images": None, "batch": "auto"}
LAUNCHERS = {  # the package of each, and the extra that installs it
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
}
# a config of its own: a plain list could not be reached through a second interpolation
OmegaConf.register_new_resolver("keys", lambda mapping: OmegaConf.create(list(mapping)), replace=True)
# ${value_of:${world.objects},${target},mace_ridge,100}: the world's entry for a concept, or else the last argument
OmegaConf.register_new_resolver(
    "value_of",
    lambda mapping, name, key, otherwise: mapping[name].get(key, otherwise) if name in mapping else otherwise,
    replace=True,
)
OmegaConf.register_new_resolver("surrogate_of", lambda given: None if given == PUBLISHED else given, replace=True)
OmegaConf.register_new_resolver("gpus_of", lambda executor: int(executor == "local"), replace=True)


def main(
    job: Callable[[Run], list[Row]],
    arguments: list[str],
    dry_job: DryJob | None = None,
    stand_ins: Mapping[str, str] | None = None,
    launch: bool = False,
) -> int:
    """Compose every job of the command line and run it.

    Returns 1 if any job failed. A failed job does not stop a sweep. A job that keeps nothing in this process may
    `launch`: hydra/launcher= then chooses where it runs. An experiment ends with its table.

    With dry_run=true nothing runs: `dry_job` receives the runs, the runs whose prompts are missing (task, model and
    reason), and the rate; without `dry_job` a report is printed. `stand_ins` (key -> file) are read if a run's
    prompts are missing and the key is not given; the run is then also among the runs.
    """
    say_what_happens()
    try:
        check_words(arguments)
    except Exception as error:  # the user's config folder may hold anything
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if "dry_run=true" in arguments:
        go_offline()  # a dry run only reports the downloads
    if not launch or "dry_run=true" in arguments:
        arguments = [word for word in arguments if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    sys.argv[1:] = flags_first(arguments)  # Hydra reads sys.argv
    # the schema of a launcher plugin is meant to check our values
    warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
    lost: list[str] = []
    sent = any(word.startswith("hydra/launcher=submitit") for word in arguments)
    try:
        with interrupt.stoppable(), Outcomes.fresh() as outcomes:
            if not outcomes.folder.is_relative_to(home()):
                sys.argv.append(f"hydra.sweep.dir={outcomes.folder}")
            jobs = Jobs(job, tuple(arguments), stand_ins or {}, outcomes)
            with every_job_waited_for(lost) if sent else nullcontext(), every_job_composed_alone(lost):
                lost += jobs.run()
            tables, measured, failed = outcomes.all()
    except KeyboardInterrupt as error:
        if interrupt.is_within():
            raise
        return interrupt.exit_code(error)
    if not jobs.composes:
        print(f"error: {lost[0]}", file=sys.stderr)
        return 2
    for line in lost:
        log.error("error: %s", line)
    try:
        if jobs.dry or jobs.uncounted:
            from .analysis.forecast import tell

            (dry_job or tell)(jobs.dry, jobs.uncounted, jobs.rates[0])
        for name, (spec, results) in tables.items():
            show(name, spec, measured, results)
    except Exception as error:  # the table asks third-party judges for their weights
        log.error("error: %s", reason_of(error))
        return 1
    return int(failed or bool(jobs.failures) or bool(lost))


def go_offline() -> None:
    """Keep this process and its children from the hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if hub := sys.modules.get("huggingface_hub.constants"):
        hub.HF_HUB_OFFLINE = True


@dataclass(eq=False)
class Jobs:
    """Jobs of one command: the function to run, and this process's outcomes."""

    job: Callable[[Run], list[Row]]
    arguments: tuple[str, ...]
    stand_ins: Mapping[str, str]
    outcomes: Outcomes
    process: int = field(default_factory=os.getpid)
    dry: list[Run] = field(default_factory=list)
    uncounted: list[tuple[str, str, str]] = field(default_factory=list)
    rates: list[float | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    composes: bool = True  # whether the command line yields any job

    def run(self) -> list[str]:
        """Hand all jobs to Hydra.

        Returns a line with the error that stopped Hydra, if there was one.
        """

        @hydra.main(config_path="pkg://erasebench.conf", config_name="config", version_base="1.3")
        def one(config: DictConfig) -> None:
            self.attempt(config)

        before = os.environ.get(RAISES)
        os.environ[RAISES] = "1"  # otherwise Hydra prints several lines and exits
        try:
            one()
        except (HydraException, OmegaConfBaseException) as error:
            self.composes = False
            return [explained(error)]
        except Exception as error:  # a configuration that does not compose, a launcher error, a full disk
            return [one_line(error)]
        finally:
            os.environ.pop(RAISES) if before is None else os.environ.update({RAISES: before})
        return []

    def attempt(self, config: DictConfig) -> None:
        """Carry out one job.

        An exception becomes the job's outcome and one line of the log; the other jobs go on.
        """
        say_what_happens()  # the launcher may have started a new process
        try:
            self.carry_out(config)
        except (Exception, SystemExit) as error:  # a plugin may raise anything, and call exit()
            line = reason_of(error)
            log.error("error: %s", line)
            self.failures.append(line)
            self.keep_failure(line)

    def keep_failure(self, line: str) -> None:
        try:
            self.outcomes.keep(error=line)
        except Exception as error:  # most likely a full disk: only the exit code can report it
            line = f"what became of a job cannot be kept: {one_line(error)}"
            if os.getpid() != self.process:  # the parent does not read this process's list of failures
                raise ErasebenchError(line) from None
            log.error("error: %s", line)

    def carry_out(self, config: DictConfig) -> None:
        check_values(config)
        self.rates.append(config.rate)
        if config.store.url:
            os.environ["ERASEBENCH_STORE"] = str(config.store.url)  # workers inherit it
        try:
            config = guessed(config)
            run = build(config)
        except Missing as error:
            if not config.dry_run:
                raise
            self.uncounted.append((HydraConfig.get().runtime.choices.task, config.model.name, str(error)))
            if not self.stand_ins:
                return
            for key in (key for key in self.stand_ins if OmegaConf.select(config, key) is None):
                OmegaConf.update(config, key, self.stand_ins[key])
            run = build(config)
        if config.dry_run:
            self.dry.append(run)
            return
        rows = self.job(run)
        if config.track == "wandb" and rows:
            from .report.wandb import mirror

            mirror(run.results / "runs" / f"{rows[0].run_id}.csv", sweep_name(config, self.arguments))
        table = OmegaConf.to_container(config.table, resolve=True) if config.table else None
        self.outcomes.keep(rows, table, run.results)


@contextmanager
def every_job_composed_alone(lost: list[str]) -> Iterator[None]:
    """Let a sweep go on past jobs that do not compose.

    Hydra's sweeper gives up at the first of them; here each becomes a line of `lost`, and the others run.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    check = BasicSweeper.validate_batch_is_legal

    def composed(sweeper: Any, batch: list[list[str]]) -> None:
        legal = []
        for job in track(batch, "composing", unit="job"):
            try:
                check(sweeper, [job])
                legal.append(job)
            except Exception as error:  # from Hydra, OmegaConf, or YAML in the user's folder
                lost.append(f"{' '.join(job)[:160]}: {one_line(error)}")
        if not legal:
            raise ErasebenchError("no job of the sweep composes")
        batch[:] = legal

    BasicSweeper.validate_batch_is_legal = composed
    try:
        yield
    finally:
        BasicSweeper.validate_batch_is_legal = check


@contextmanager
def every_job_waited_for(lost: list[str]) -> Iterator[None]:
    """Let a submitit sweep go on past jobs that were killed.

    submitit's launcher gives up at the first of them; here each becomes a line of `lost`, and the others go on.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from submitit.core import core, utils

    results = core.Job.results

    def waited(job: Any) -> list:
        try:
            return results(job)
        except (utils.UncompletedJobError, utils.FailedJobError) as error:
            lost.append(f"submitit's job {job.job_id} died: {str(error).strip().splitlines()[0]}")
            return [JobReturn(_return_value=None, status=JobStatus.COMPLETED)]

    core.Job.results = waited
    try:
        yield
    finally:
        core.Job.results = results


def say_what_happens() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("[%(asctime)s] %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the jobs of one command, two files per job.

    They lie in a folder that all processes see: a launcher may have sent jobs to other processes or machines.
    """

    folder: Path

    @classmethod
    @contextmanager
    def fresh(cls) -> Iterator[Outcomes]:
        folder = home() / "sweeps" / secrets.token_hex(8)
        new = [place for place in (folder.parent, home()) if not place.exists()]
        try:
            folder.mkdir(parents=True)
        except OSError:  # a read-only store: no other machine takes part then
            folder = Path(tempfile.mkdtemp(prefix="erasebench-"))
        try:
            yield cls(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for place in new:  # --help and refused commands leave nothing behind
                with suppress(OSError):
                    place.rmdir()

    def keep(
        self, rows: Sequence[Row] = (), table: dict | None = None, results: Path | None = None, error: str = ""
    ) -> None:
        from .rows import replace_file, write

        job = HydraConfig.get().job
        number = 0 if OmegaConf.is_missing(job, "num") else job.num
        write(rows, self.folder / f"{number:06}.csv")
        error = error or next((row.reason for row in rows if row.status == "failed"), "")
        said = {"error": error, "table": table, "results": str(results), "process": [socket.gethostname(), os.getpid()]}
        replace_file(self.folder / f"{number:06}.json", json.dumps(said).encode())

    def all(self) -> tuple[dict[str, tuple[dict, Path]], list[Row], bool]:
        """Return tables by name, rows, and whether any job failed.

        Each table comes with its results folder; rows are in the order of the jobs.
        """
        from .rows import read

        tables, rows, failed = {}, [], False
        for path in sorted(self.folder.glob("*.json")):
            said = json.loads(path.read_text())
            failed |= bool(said["error"])
            if said["error"] and said["process"] != [socket.gethostname(), os.getpid()]:
                log.error("job %d: %s", int(path.stem), said["error"])  # its own log may be elsewhere
            if said["table"]:
                tables[said["table"]["name"]] = said["table"], Path(said["results"])
            rows += read(path.with_suffix(".csv"))
        return tables, rows, failed


def sweep_name(config: DictConfig, arguments: Sequence[str]) -> str:
    """Return the common name of the runs of one command.

    It is the table's name, or the sweep's overrides; empty for a single run.
    """
    if config.table:
        return config.table.name
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    return " ".join(word for word in repeatable(arguments) if re.match(r"[^-]\S*=", word))


def one_line(error: BaseException) -> str:
    """Return the message that the user needs, on one line, never empty.

    It is the message of the innermost cause, unless an ErasebenchError comes before it.
    """
    while error.__cause__ is not None and not isinstance(error, ErasebenchError):
        error = error.__cause__
    if isinstance(error, SystemExit):
        return f"it called exit({error.code})"
    return " ".join(redact(str(error)).split()) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return one line that explains the end of a job.

    The traceback of an error that the user did not cause goes to the log.
    """
    cause = error
    while isinstance(cause, HydraException) and cause.__cause__ is not None:
        cause = cause.__cause__  # the error that the plugin raised on instantiation
    line = one_line(error)
    if isinstance(cause, (ErasebenchError, HydraException, OmegaConfBaseException, SystemExit)):
        return line
    if isinstance(cause, OSError | UnicodeError) or cause is not error:  # a file error, or refused hyperparameters
        key = re.search(r"full_key: (\S+)", str(error)) if cause is not error else None
        kind = type(cause).__name__
        return (f"{key[1]}: " if key else "") + (line if line.startswith(kind) else f"{kind}: {line}")
    from .run.record import explain

    return explain(error)


def check_words(arguments: list[str]) -> None:
    """Refuse unknown choices and keys, and values that Hydra cannot parse.

    The message gives the nearest name; Hydra's own message lists the names but does not compare.
    """
    folders = [Path(str(resources.files("erasebench.conf")))]
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value))
    choices = {group: sorted({f.stem for d in folders for f in (d / group).glob("*.yaml")}) for group in GROUPS}
    keys = [
        *yaml.safe_load((folders[0] / "config.yaml").read_text()),
        *GROUPS,
        *CHOICES[len(GROUPS) :],
        "hydra",
        "hydra/launcher",
    ]
    chosen: dict[str, list[str]] = {}
    for argument in arguments:
        match = re.fullmatch(r"([\w/]+)((?:\.[\w.]+)?)=(.*)", argument, re.DOTALL)
        if not match:
            continue
        key, rest, value = match.groups()
        refuse_unknown("option", key, keys)
        if key in choices and key != "attack" and not rest and value[:1] in ("[", "{"):
            raise ErasebenchError(f"{argument}: one {key} is needed; -m {key}={value.strip('[]{} ') or '...'} runs each")
        if key == "store" and rest:  # Hydra would repeat the whole word, including any password in the URL
            refuse_unknown("store.", rest[1:], ["url"])
        if key == "attack" and not rest:
            value = value.strip("[]").replace(" ", "")
        if key == "hydra/launcher":
            refuse_unknown(key, value, ["basic", *LAUNCHERS])
            if value in LAUNCHERS and not find_spec(f"hydra_plugins.{LAUNCHERS[value][0]}"):
                raise ErasebenchError(f"hydra/launcher={value} needs pip install 'erasebench[{LAUNCHERS[value][1]}]'")
            if value == "submitit_slurm" and "dry_run=true" not in arguments and not shutil.which("sbatch"):
                raise ErasebenchError(
                    f"hydra/launcher={value}: no sbatch on this machine, is it one of a Slurm cluster?"
                )
        if key == "track":
            refuse_unknown("track", value, ["none", "wandb"])
        if key in choices and not rest and value and not re.search(r"[\[\]${}*]", value):
            for choice in value.split(","):
                refuse_unknown(key, choice, choices[key])
                chosen.setdefault(key, []).append(choice)
    for argument in arguments:
        match = re.match(rf"({'|'.join(GROUPS)})\.(\w+)", argument)
        if match and chosen.get(match[1]):
            known = {
                key for folder in folders for choice in chosen[match[1]] for key in keys_of(folder / match[1], choice)
            }
            refuse_unknown(f"{match[1]}.", match[2], sorted(known))
    check_grammar(arguments)


def keys_of(folder: Path, choice: str) -> set[str]:
    """Return all keys of a config file, including defaults and parents."""
    path = folder / f"{choice}.yaml"
    content = complete(yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    parents = [parent for parent in content.pop("defaults", []) if isinstance(parent, str) and parent != "_self_"]
    return set(content).union(*(keys_of(folder, parent) for parent in parents))


def refuse_unknown(what: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ErasebenchError(f"unknown {what} {name!r}{hint} (choices: {', '.join(known)})")


def guessed(config: DictConfig) -> DictConfig:
    """Return the configuration of a task that erases the target.

    Recomposes only if the command line chooses no task and the world knows the target's kind.
    """
    said = {word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task}
    if config.target is None or config.kind is not None or said & {"task", "experiment"}:
        return config
    from .own_concept import TASKS, kind_of

    world = OmegaConf.to_container(config.world, resolve=True)
    kind = kind_of(world, config.target)
    if kind is None or HydraConfig.get().runtime.choices.task in TASKS[kind]:
        return config
    log.info("%s: kind=%s, and so task=%s", config.target, kind, TASKS[kind][0])
    made = hydra.compose("config", [*HydraConfig.get().overrides.task, f"kind={kind}"])
    check_values(made)
    return made


def described(config: DictConfig) -> Asked:
    """Collect the options of the command line for the user's own concept."""
    from .own_concept import Asked

    listed = lambda names: None if names is None else tuple(names)
    given = None if config.surrogate == PUBLISHED else config.surrogate
    surrogates = [given] if isinstance(given, str) else given or ()
    reference = config.reference.path
    return Asked(config.kind, listed(config.keep), listed(config.synonyms), tuple(map(str, surrogates)), reference)


def with_judges(run: Run, own: Own, config: DictConfig) -> Run:
    """Return the run with judges for the user's own concept."""
    from .run.own_judges import judged, reference_of

    spec, given = config.world.judges, config.reference
    clip = hydra.utils.instantiate(spec.clip)
    people = hydra.utils.instantiate(spec.identity)
    reference = reference_of(given.path, given.by, own.kind, clip, people) if given.path else None
    return judged(run, own, clip, reference)


def build(config: DictConfig) -> Run:
    """Build the frozen Run of a composed configuration.

    Raises ErasebenchError for anything that does not fit; names, numbers and prompts are checked before a plugin,
    and torch with it, is imported.
    """
    check_numbers(config)
    world = world_of(config)
    plan, own = plan_of(config, world)
    check_plugins(config)
    from .model.devices import check_gpu_is_seen, own_device
    from .run.specification import Run

    if config.device == "auto" and not config.dry_run:
        check_gpu_is_seen()

    eraser = hydra.utils.instantiate(config.method)
    check_types(eraser, "method")
    if config.surrogate == PUBLISHED:
        from .tasks import with_published_surrogate

        plan = with_published_surrogate(plan, eraser.published_surrogates if isinstance(eraser, HasPublishedSurrogates) else {})
    attacks = {str(name): hydra.utils.instantiate(spec, _convert_="object") for name, spec in config.attack.items()}
    for name, attack in attacks.items():
        check_types(attack, f"attack.{name}")
        check_budget(attack, f"attack.{name}")
    executor = hydra.utils.instantiate(config.executor)
    check_types(executor, "executor")
    device = str(config.device) if config.device != "auto" else own_device(*side_by_side())
    chosen = HydraConfig.get().runtime.choices
    run = Run(
        method=chosen["method"],
        eraser=eraser,
        source=source_of(config),
        world=world["name"],
        plan=replace(plan, evaluators=evaluators_of(config, plan)),
        sampler=sampler_of(config),
        seed=config.seed,
        target=plan.which or (plan.concepts[0].name if len(plan.concepts) == 1 else ""),
        batch=config.batch if config.batch != "auto" else config.world.batch if device == "cpu" else 0,
        speed=config.speed,
        device=device,
        judges=device if config.judges.device == "auto" else str(config.judges.device),
        results=Path(config.results),
        second=hydra.utils.instantiate(config.world.second.get(plan.task), _convert_="object"),
        given=tuple(config.method),
        attacks=attacks,
        attacked=config.attacked,
        together=config.together,
        executor=executor,
        pictured=pictured_of(config),
        overrides=repeatable(HydraConfig.get().overrides.task),
    )
    return with_judges(run, own, config) if own else run


def check_numbers(config: DictConfig) -> None:
    """Raise ErasebenchError for invalid integers or an unknown speed."""
    for name, least in (("n", 1), ("images", 1), ("batch", 1), ("seed", 0), ("attacked", 1), ("together", 1)):
        value = config[name]
        unset = name in UNSET and value == UNSET[name]
        if not unset and (type(value) is not int or value < least):
            raise ErasebenchError(f"{name}={value}: a whole number, at least {least}, is needed")
    refuse_unknown("speed", config.speed, ["exact", "fast"])
    sampler_of(config)


def sampler_of(config: DictConfig) -> Sampler:
    from .contracts import Sampler

    sampler = Sampler(**config.sampler)
    check_types(sampler, "sampler")
    if sampler.steps < 1:
        raise ErasebenchError(f"sampler.steps={sampler.steps}: at least one step is needed")
    return sampler


def world_of(config: DictConfig) -> dict[str, Any]:
    """Return the world with its captions."""
    from . import prompt_files

    world = OmegaConf.to_container(config.world, resolve=True)
    evaluation, training, seeds = prompt_files.seeded_captions(world["captions"])
    world["captions"] |= {"evaluation": evaluation, "training": training, "seeds": seeds}
    chosen = HydraConfig.get().runtime.choices
    if chosen["model"] == "mini" and not any(o.startswith("model=") for o in HydraConfig.get().overrides.task):
        log.info("model: mini, the embedded model (the default; model=sd14, sd15 or sd21 for Stable Diffusion)")
    return world


def plan_of(config: DictConfig, world: Mapping[str, Any]) -> tuple[Plan, Own | None]:
    """Return (the plan, the user's own concept or None).

    The second is set only if the task erases that concept. A task of the package is planned without its evaluators,
    which need torch.
    """
    from .own_concept import planned
    from .tasks import asked, in_other_words, shown, together, turned

    spec = config.task
    if str(spec.get("_target_")).startswith(PACKAGE_TASKS):
        spec = {key: spec[key] for key in spec if key != "evaluators"}
    task = hydra.utils.instantiate(spec, _convert_="object")
    plan, own = planned(task, world, described(config), config.n, config.target, config.images)
    if config.concepts:
        plan = together(plan, world, list(config.concepts))
    if config.surrogate is not None and config.surrogate != PUBLISHED:
        given = [config.surrogate] if isinstance(config.surrogate, str) else config.surrogate
        plan = turned(plan, [str(name) for name in given])
    if config.pictures.path:
        plan = shown(plan)
    if config.prompts.path:
        plan = asked(plan, OmegaConf.to_container(config.prompts, resolve=True), config.images)
    if config.other_words:
        plan = in_other_words(plan, world, list(config.other_words), config.images)
    return plan, own


def evaluators_of(config: DictConfig, plan: Plan) -> dict[str, Evaluator | None]:
    """Return the task's evaluators; one without splits is left out."""
    evaluators = plan.evaluators or {
        str(name): hydra.utils.instantiate(spec, _convert_="object") for name, spec in (config.task.get("evaluators") or {}).items()
    }
    for name, evaluator in evaluators.items():
        if evaluator is not None:
            check_lists(evaluator, f"task.evaluators.{name}")
    return {name: e for name, e in evaluators.items() if e is None or len(e.splits)}


def pictured_of(config: DictConfig) -> Pictured | None:
    if not config.pictures.path:
        return None
    from .toolbox.inversion import Pictured

    pictured = Pictured(**config.pictures)
    check_types(pictured, "pictures")
    return pictured


def source_of(config: DictConfig) -> Source:
    from .model.source import Source

    model, path = config.model, config.model.path
    if path == "embedded":
        return embedded_source(model.dtype)
    return Source(model.name, Path(str(path)) if path else None, model.hub, "" if path else model.revision, model.dtype)


def side_by_side() -> tuple[bool, int]:
    """Return (whether jobs share the GPUs of one machine, the job's number).

    Jobs share them if a launcher runs them side by side.
    """
    hydra = HydraConfig.get()
    alone = (
        hydra.mode != RunMode.MULTIRUN
        or "BasicLauncher" in hydra.launcher._target_
        or hydra.runtime.choices.executor != "local"
    )
    return (False, 0) if alone else (True, hydra.job.num)


def alone(job: Callable[[Run], list[Row]], words: Sequence[str]) -> int:
    """Carry out a single run, without a sweep or an experiment's table."""
    return main(job, [*words, *ALONE])


def embedded_source(dtype: str = "float32") -> Source:
    """Return the model that ships with the package."""
    from .model.source import Source

    folder = Path(__file__).parent / "mini" / "weights" / "sd"
    if not (folder / "model_index.json").is_file():
        raise ErasebenchError("the embedded model is not in this installation: `make mini` trains it")
    return Source("mini", folder, dtype=dtype)


def check_budget(attack: Any, where: str) -> None:
    """Refuse attack budgets that are too small.

    Every integer field is a count, and none may be 0 unless its default or its `least` is 0.
    """
    for f in fields(attack):
        value = getattr(attack, f.name)
        least = f.metadata.get("least", 0 if f.default == 0 else 1)
        if type(value) is int and value < least:
            raise ErasebenchError(f"{where}.{f.name}={value}: at least {least} is needed")


def check_types(plugin: Any, where: str) -> None:
    """Refuse hyperparameters of other types than the dataclass declares.

    Hydra passes on any value that was typed.
    """
    hints = typing.get_type_hints(type(plugin))
    for f in fields(plugin):
        value, allowed = getattr(plugin, f.name), typing.get_args(hints[f.name]) or (hints[f.name],)
        if typing.get_origin(hints[f.name]) is Literal:
            if value not in allowed:
                raise ErasebenchError(f"{where}.{f.name}={value}: choose from {', '.join(map(str, allowed))}")
        elif set(allowed) <= {int, float, str, bool, type(None)}:
            numeric = isinstance(value, int) and not isinstance(value, bool) and float in allowed
            if type(value) not in allowed and not numeric:
                wanted = " or ".join(kind.__name__ for kind in allowed)
                raise ErasebenchError(f"{where}.{f.name}={value!r}: {wanted} is needed")
