"""The paper's questions, and one that it does not ask, at a scale that a laptop runs. Write-up: benchmarks/STUDY.md.

    python samples/study/inputs.py                        # weaker bases and a teacher's answers, for the toy scale
    python samples/study/study.py --jobs 2                # everything: an hour or two on two cores
    python samples/study/study.py --only methods tau      # some questions
    python samples/study/study.py --tables                # what is there already
    python samples/study/study.py --scale smollm2         # SmolLM2-135M on GSM8K, where there is a GPU

Stopped anywhere, the same command continues: it is `gft generate`, `gft train` and `gft eval` as functions. What
is asked stands in questions.py. Data sets, runs and tables go to OUT.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent
sys.path.insert(0, str(HERE))

from questions import EVERY, QUESTIONS, SHOWN, Condition, Question, needed  # noqa: E402

from gftdata.config import GenerateConfig, load_config, load_settings, read_settings  # noqa: E402
from gftdata.errors import UserError  # noqa: E402
from gfttrain.compare_config import BASE  # noqa: E402
from gfttrain.config import EvalConfig, TrainConfig  # noqa: E402
from gfttrain.presets import folder_name  # noqa: E402


@dataclass(frozen=True, slots=True)
class Scale:
    """Which model and task: settings of generation, training and evaluation, each a file."""

    generate: Path
    train: Path
    evaluate: Path
    untrained: tuple[str, ...]  # benchmarks of skills that are not trained
    watch_prompts: int  # of the first benchmark, for evaluations during training
    watch_every: int  # steps
    has_bases: bool  # weaker models to start from, in OUT/bases


SCALES = {
    "toy": Scale(
        HERE / "toy.yaml",
        SAMPLES / "demo" / "train.yaml",
        SAMPLES / "demo" / "eval.yaml",
        ("subtraction", "reversal"),
        watch_prompts=128,
        watch_every=8,
        has_bases=True,
    ),
    "smollm2": Scale(
        HERE / "smollm2-generate.yaml",
        HERE / "smollm2-train.yaml",
        HERE / "smollm2-eval.yaml",
        (),
        watch_prompts=128,
        watch_every=8,
        has_bases=False,
    ),
}


@dataclass(frozen=True, slots=True)
class Study:
    """Where the parts of a study are."""

    scale: Scale
    out: Path
    limit: int | None  # prompts, of training and of each benchmark; None: all

    @property
    def model(self) -> str:
        return str(read_settings(self.scale.train)["model"])

    @property
    def has_teacher(self) -> bool:
        return bool(read_settings(self.scale.generate)["responses"].get("teachers"))

    def start_of(self, condition: Condition, seed: int) -> str:
        """The model that a run starts from, and that drew its self samples."""
        if condition.start:
            return str(self.run(EVERY[condition.start], seed) / "final")
        return self.base_model(condition)

    def base_model(self, condition: Condition) -> str:
        """The untrained model behind it."""
        return str(self.out / "bases" / condition.base / "model") if condition.base else self.model

    def run(self, condition: Condition, seed: int) -> Path:
        return self.out / "runs" / f"{_folder(condition.name)}-seed-{seed}"

    def data(self, condition: Condition, seed: int) -> Path:
        g = condition.groups
        drawn_from = _folder(condition.start) if condition.start else condition.base or "base"
        return self.out / "data" / f"{drawn_from}-{g.expert}-{g.teacher}-{g.own}-seed-{seed}"

    def base_results(self, condition: Condition) -> Path:
        return self.out / "runs" / f"base-{condition.base}" if condition.base else self.out / "runs" / BASE

    def generation(self, condition: Condition, seed: int) -> GenerateConfig:
        settings = read_settings(self.scale.generate)
        responses, groups = settings["responses"], condition.groups
        responses["expert"]["count"], responses["self"]["count"] = groups.expert, groups.own
        teachers = responses.pop("teachers", [])
        if groups.teacher:
            responses["teachers"] = [{**teacher, "count": groups.teacher} for teacher in teachers]
        settings |= {"model": self.start_of(condition, seed), "out": str(self.data(condition, seed)), "seed": seed}
        settings["prompts"] |= self._limit()
        made = self.out / "prompts.jsonl"
        if made.is_file():
            settings["prompts"]["path"] = str(made)
        return load_settings(GenerateConfig, settings, str(self.scale.generate))

    def training(self, condition: Condition, seed: int) -> TrainConfig:
        values: dict[str, Any] = {
            "model": self.start_of(condition, seed),
            "data": str(self.data(condition, seed)),
            "out": str(self.run(condition, seed)),
            "seed": seed,
            "objective": condition.objective,
            **condition.train,
        }
        if condition.watched:
            block = self.evaluation(self.model, self.out).benchmarks[0]
            values["evaluation"] = {
                "every_steps": self.scale.watch_every,
                "prompts": {**block.prompts.model_dump(), "limit": self.limit or self.scale.watch_prompts},
                "reward": block.reward.model_dump(),
                "num_samples": 4,
                "max_tokens": block.max_tokens,
                "sampling": {"temperature": 1.0},
                "stop_when_worse": False,  # stopping.py asks which runs it would have ended
            }
        return load_config(TrainConfig, self.scale.train, values=values)

    def evaluation(self, model: str, out: Path) -> EvalConfig:
        settings = read_settings(self.scale.evaluate)
        for block in settings["benchmarks"]:
            block["prompts"] |= self._limit()
        return load_settings(EvalConfig, settings | {"model": model, "out": str(out)}, str(self.scale.evaluate))

    def _limit(self) -> dict[str, int]:
        return {} if self.limit is None else {"limit": self.limit}


@dataclass(frozen=True, slots=True)
class Task:
    """One process's work: groups, a trained model, or the results of a model."""

    study: Study
    condition: Condition
    seed: int
    what: str  # data, train, base

    def do(self) -> str:
        # here, and not above: each worker loads torch for itself
        import torch
        from transformers.utils import logging

        from gftdata.generate import generate
        from gfttrain.evaluate import evaluate
        from gfttrain.train import train

        logging.disable_progress_bar()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // JOBS))
        study, condition, seed = self.study, self.condition, self.seed
        if self.what == "data":
            generate(study.generation(condition, seed))
            return str(study.data(condition, seed))
        if self.what == "base":
            folder = study.base_results(condition)
            evaluate(study.evaluation(study.base_model(condition), folder))
            return str(folder)
        config = study.training(condition, seed)
        if condition.redraw_every is None:
            train(config)
        else:
            from on_policy import train_on_policy

            own = study.generation(condition, seed).responses
            train_on_policy(
                config,
                condition.redraw_every,
                study.generation(condition, seed).reward.name,
                own.own.sampling.with_limit(own.max_tokens),
                adam_anew=condition.adam_anew,
            )
        if condition.name in SHOWN:
            evaluate(study.evaluation(str(Path(config.out) / "final"), Path(config.out)))
        return config.out


JOBS = 1  # processes at a time; each worker is told when it starts


def set_jobs(jobs: int) -> None:
    global JOBS
    JOBS = jobs


def carry_out(task: Task) -> str:
    return task.do()


def run_study(study: Study, questions: Sequence[Question], seeds: Sequence[int], jobs: int) -> None:
    """Everything that the questions need; what is there is looked at and left alone."""
    conditions = needed(questions)
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, set_jobs, (jobs,)) as pool:
        bases = {study.base_results(c): Task(study, c, 0, "base") for c in conditions}
        work(pool, list(bases.values()))
        # in stages: a later round needs the models of the one before
        done: set[str] = set()
        while len(done) < len(conditions):
            ready = [c for c in conditions if c.name not in done and (not c.start or c.start in done)]
            data = {study.data(c, seed): Task(study, c, seed, "data") for c in ready for seed in seeds}
            work(pool, list(data.values()))
            work(pool, [Task(study, c, seed, "train") for c in ready for seed in seeds])
            done |= {c.name for c in ready}


def work(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> None:
    for number, place in enumerate(pool.map(carry_out, tasks), 1):
        print(f"  {number}/{len(tasks)}  {place}", flush=True)


def write_tables(study: Study, questions: Iterable[Question], seeds: Sequence[int]) -> None:
    """Print a table for each question, and write them to OUT/tables.txt."""
    from rich.console import Console

    from gftcli import show_comparison
    from gfttrain.comparison import Row, make_row

    names = [block.name for block in study.evaluation(study.model, study.out).benchmarks]
    trained = [name for name in names if name not in study.scale.untrained]
    path = study.out / "tables.txt"
    with path.open("w") as file:
        for console in (Console(width=160), Console(file=file, width=160)):
            for question in questions:
                rows: list[Row] = []
                for condition in question.conditions:
                    base = study.base_results(condition)
                    title = BASE if not condition.base else f"{BASE}, {condition.base}"
                    if title not in [row.method for row in rows]:
                        rows.append(make_row(title, [base], None, names, study.scale.untrained))
                    folders = [study.run(condition, seed) for seed in seeds]
                    rows.append(make_row(condition.name, folders, base, names, study.scale.untrained))
                rows = [row for row in rows if len(row.cells) == len(names)]
                if not rows:
                    continue
                console.print(f"\n{question.title}\n", style="bold", highlight=False)
                for name in trained:
                    console.print(show_comparison.benchmark_table(rows, name))
                if study.scale.untrained:
                    console.print(show_comparison.untrained_table(rows, study.scale.untrained))
    print(
        f"\nMeans over {len(seeds)} seeds, each with groups and an order of its own; 95 % is Student's interval over "
        "them (of a base, over\nprompts), p a t-test of the change against its base. Entropy and KL in nats a token."
        f"\n{path}"
    )


def _folder(name: str) -> str:
    return folder_name(name.replace(",", "").replace(" / ", " by ").replace(":", "-to-"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="toy")
    parser.add_argument("--out", type=Path, help="default: runs/study, runs/study-smollm2")
    parser.add_argument("--only", nargs="+", choices=[q.name for q in QUESTIONS], help="these questions")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, help="prompts of training and of each benchmark: to see it work")
    parser.add_argument("--tables", action="store_true", help="run nothing, show what is there")
    return parser.parse_args()


def main() -> None:
    options = parse()
    out = options.out or Path("runs/study" if options.scale == "toy" else f"runs/study-{options.scale}")
    study = Study(SCALES[options.scale], out, options.limit)
    questions = [q for q in QUESTIONS if options.only is None or q.name in options.only]
    for question in tuple(questions):
        if question.teacher and not study.has_teacher:
            print(f"left out: {question.name}, for {study.scale.generate.name} names no teacher")
            questions.remove(question)
        elif any(c.base for c in question.conditions) and not study.scale.has_bases:
            print(f"left out: {question.name}, for there are no weaker models at this scale")
            questions.remove(question)
    seeds = range(options.seeds)
    if not options.tables:
        run_study(study, questions, seeds, options.jobs)
    write_tables(study, questions, seeds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
