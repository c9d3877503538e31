"""What `gft train` finds out before it loads a model: data, plan, where it goes on, what is wrong.

Also the run folder, so that others can tell a finished run from one that is not.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from gftdata.config import recipe_differences
from gftdata.errors import UserError
from gftdata.index import Index
from gftdata.locations import Shard, open_data, read_index
from gftdata.manifest import Manifest
from gftdata.models import model_revision
from gftdata.shards import check_writable, write_atomic
from gftdata.store import read_file
from gftdata.summary import weakness
from gftdata.tokens import Tokenizer, load_tokenizer
from gftdata.types import SELF
from gfttrain import checkpoint
from gfttrain.benchmarks import read_questions
from gfttrain.config import TrainConfig
from gfttrain.loggers import check_loggers
from gfttrain.model import check_layout, outline, parameter_counts, training_cost
from gfttrain.plan import (
    Cost,
    Selection,
    Step,
    check_context,
    check_selection,
    make_schedule,
    pass_rate,
    schedule_hash,
    select,
    unscheduled_shards,
)
from gfttrain.runs import FINAL, RUN


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has been found sound: its data, its schedule, and where it goes on."""

    tokenizer: Tokenizer
    manifests: tuple[Manifest, ...]
    shards: tuple[Shard, ...]  # of all data, in the order of the index's paths
    index: Index
    selection: Selection
    steps: tuple[Step, ...]
    unscheduled_shards: tuple[int, ...]  # of which no group is in a step, and some are left out
    schedule_hash: str
    cost: Cost
    num_parameters: int
    resume_from: Path | None
    first_step: int
    finished: bool
    notices: tuple[str, ...]


def prepare(config: TrainConfig) -> Prepared:
    """Check everything that can be checked and plan the run. Writes nothing. Raises UserError."""
    found = [open_data(location) for location in config.data]
    manifests, shards = [data.manifest for data in found], [shard for data in found for shard in data.shards]
    tokenizer = load_tokenizer(config.model)
    notices = [note for data in found for note in _check_model(config, tokenizer, data.location, data.manifest)]
    outlined = outline(config.model)
    check_layout(outlined, config.batch.layout)
    index = read_index(shards)
    selection = select(index, config.objective, config.filter)
    skip_unjudged = config.unjudged_groups == "skip"
    check_selection(index, selection, config.objective, skip_unjudged=skip_unjudged)
    check_context(index, selection, getattr(outlined.config.get_text_config(), "max_position_embeddings", None))
    notices += _weakness(config, index)
    steps = make_schedule(
        index,
        selection,
        config.batch,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        skip_unjudged=skip_unjudged,
    )
    digest = schedule_hash(index, selection, steps, [shard.record.sha256 for shard in shards])
    check_loggers(config.loggers)
    if config.evaluation is not None:  # a wrong column or an unknown reward would show after hours
        read_questions(config.evaluation.prompts, config.evaluation.reward, tokenizer)
    out = Path(config.out)
    _check_output(config, out)
    resume_from = checkpoint.latest(out)
    position = checkpoint.read_position(resume_from) if resume_from else checkpoint.Position(0, digest)
    if position.schedule_hash != digest:
        raise UserError(
            f"{resume_from}: was saved on other data: the schedule of steps differs; restore the data, or name "
            "another run folder (out)"
        )
    make_scheduler(config, make_optimizer(config, [torch.zeros(1)]), len(steps))  # a wrong name is found here
    return Prepared(
        tokenizer=tokenizer,
        manifests=tuple(manifests),
        shards=tuple(shards),
        index=index,
        selection=selection,
        steps=steps,
        unscheduled_shards=unscheduled_shards(index, selection, steps),
        schedule_hash=digest,
        cost=training_cost(outlined),
        num_parameters=parameter_counts(outlined)[0],
        resume_from=resume_from,
        first_step=position.step,
        finished=(out / FINAL).is_dir(),
        notices=tuple(notices),
    )


def write_run_file(config: TrainConfig, out: Path) -> None:
    """Mark a folder as this run's, with the resolved config and the exact base model."""
    run = {
        "recipe": config.recipe(),
        "config": config.model_dump(mode="json"),
        "revision": model_revision(config.model),
    }
    write_atomic(out / RUN, json.dumps(run, indent=2) + "\n")


def _check_model(config: TrainConfig, tokenizer: Tokenizer, location: str, manifest: Manifest) -> list[str]:
    reference = next((record for record in manifest.models if record.role == "reference"), None)
    if reference is None:
        raise UserError(f"{location}: its manifest names no reference model")
    if tokenizer.hash != manifest.tokenizer.hash:
        raise UserError(
            f"{location}: its token ids come from the tokenizer of {reference.name}, and {config.model} has another; "
            "train the model that the data was generated for, or generate it again with this one"
        )
    notices = []
    if tokenizer.template_hash != manifest.tokenizer.template_hash:
        notices.append(f"{location}: was generated with another chat template than that of {config.model}")
    if model_revision(config.model) != reference.revision:
        notices.append(f"{location}: its reference is {reference.name}, {config.model} has other weights")
    return notices


def _check_output(config: TrainConfig, out: Path) -> None:
    check_writable(out)
    left = f".{RUN}."  # what a process left that was killed while it wrote the file
    if not out.exists() or (out.is_dir() and all(path.name.startswith(left) for path in out.iterdir())):
        return
    try:
        run = json.loads(read_file(out / RUN))
        recipe, revision = run["recipe"], run["revision"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        raise UserError(f"{out}: not empty and not a run of gft train; name another folder (out)") from None
    differing = recipe_differences(recipe, config.recipe())
    if differing:
        raise UserError(f"{out}: was begun with another config: {differing}; or name another folder (out)")
    if revision != model_revision(config.model):
        raise UserError(f"{out}: was begun from other weights of {config.model}; name another folder (out)")


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """AdamW, in one kernel."""
    optim = config.optim
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """The learning rate as a function of the step, by its name in transformers. Raises UserError."""
    name = config.optim.schedule
    warmup = math.ceil(config.optim.warmup_ratio * num_steps)
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    except (ValueError, KeyError, TypeError) as error:  # TypeError: it needs a setting of its own
        raise UserError(f"optim.schedule {name} cannot be used: {error}") from None
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise UserError(f"optim.schedule {name} follows a metric; use one of the number of steps, such as cosine")
    return scheduler


def _weakness(config: TrainConfig, index: Index) -> list[str]:
    told = None if config.objective.advantage == "one" else weakness(pass_rate(index, (SELF,)))
    return [] if told is None else [told]
