"""GFT with self samples drawn anew during training, every so many steps: what `gft train`, by design, does not do.

The paper draws the self samples of every step from the current model; the toolkit's are frozen. This is the other side
of that comparison: one process, sampling and training in turn, with the optimizer's state kept. Model, schedule of
prompts, optimizer, objective and batch are `gft train`'s own, and so are the first groups: where samples are not drawn
again the trained weights are those of `gft train` (tests/samples/test_study.py). For models that generate in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from gftdata.engines.hf import HfEngine
from gftdata.groups import sample_seed
from gftdata.manifest import read_manifest
from gftdata.rewards import judge
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths
from gftdata.types import SELF, Completion, Group, Response, SampleRequest, Sampling
from gfttrain.advantage import group_advantages
from gfttrain.config import TrainConfig
from gfttrain.distributed import alone
from gfttrain.model import Policy, export, load_for_training, trained_state
from gfttrain.objective import token_losses
from gfttrain.plan import Step
from gfttrain.prepare import make_optimizer, prepare, write_run_file
from gfttrain.runs import FINAL
from gfttrain.stream import Example, collate


def train_on_policy(
    config: TrainConfig, every: int, reward: str, sampling: Sampling, *, adam_anew: bool = False
) -> Path:
    """Train as `gft train` would, but draw the self samples of the coming `every` steps anew each `every` steps.

    With `adam_anew` the optimizer begins anew each time, as in a round of `gft generate` and `gft train`. For GFT's
    group advantages over all sources, one data set in a folder, one device, a constant learning rate. Returns where the
    final model is; one that is there is left alone.
    """
    prepared = prepare(config)
    out = Path(config.out)
    if prepared.finished:
        return out / FINAL
    torch.manual_seed(config.seed)
    policy = load_for_training(config, alone(torch.device("cpu")))
    parameters = list(policy.parameters())
    optimizer = make_optimizer(config, parameters)
    groups = read_groups(Path(config.data[0]))
    engine = HfEngine(policy.model, prepared.tokenizer, batch_size=512, batch_tokens=16384)
    write_run_file(config, out)
    for number, step in enumerate(prepared.steps):
        if number and number % every == 0:
            coming = np.unique(np.concatenate([s.groups for s in prepared.steps[number : number + every]]))
            policy.eval()
            drawn = draw_again([groups[g] for g in coming], engine, sampling, reward, seed=1000 * config.seed + number)
            policy.train()
            groups |= dict(zip(coming.tolist(), drawn, strict=True))
            if adam_anew:
                optimizer = make_optimizer(config, parameters)
        update(policy, optimizer, config, [groups[g] for g in step.groups.tolist()], step)
    export(trained_state(policy), config, prepared.tokenizer, out / FINAL)
    return out / FINAL


def read_groups(folder: Path) -> dict[int, Group]:
    """The groups of a data set, by their number in the trainer's index."""
    tables = (pq.read_table(path) for path in shard_paths(folder, read_manifest(folder)))
    return dict(enumerate(group for table in tables for group in table_to_groups(table)))


def draw_again(groups: Sequence[Group], engine: HfEngine, sampling: Sampling, reward: str, seed: int) -> list[Group]:
    """The groups with new self samples, as many as they had, judged and with their log-probs."""
    requests = [
        SampleRequest(p.prompt_id, k, p.messages, group.prompt_ids, sample_seed(seed, p.prompt_id, SELF, k))
        for group in groups
        for p in (group.prompt,)
        for k in range(sum(response.completion.source == SELF for response in group.responses))
    ]
    prompts = {group.prompt.prompt_id: group.prompt for group in groups}
    drawn: dict[str, list[Response]] = {name: [] for name in prompts}
    for sample in sorted(engine.sample(requests, sampling), key=lambda sample: sample.request.index):
        name = sample.request.prompt_id
        completion = Completion(
            SELF, sample.text, sample.response_ids, sample.finish_reason, "", None, sample.behavior_logprobs
        )
        # drawn at temperature 1 and top-p 1: how it was drawn is how likely it is
        drawn[name].append(Response(completion, judge(reward, prompts[name], sample.text), sample.behavior_logprobs))
    return [
        replace(
            group,
            responses=(
                *(response for response in group.responses if response.completion.source != SELF),
                *drawn[group.prompt.prompt_id],
            ),
        )
        for group in groups
    ]


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig, groups: Sequence[Group], step: Step
) -> None:
    """One optimizer step on these groups, in one micro-batch."""
    advantages = [group_advantages([response.verdict.reward for response in group.responses]) for group in groups]
    examples = [
        Example(
            group.prompt_ids,
            tuple(response.completion.response_ids for response in group.responses),
            tuple(response.ref_logprobs for response in group.responses),
            of_group,
            np.zeros(len(group.responses), np.int32),
            tuple(range(len(group.responses))),
        )
        for group, of_group in zip(groups, advantages, strict=True)
        if of_group.any()
    ]
    num_tokens = sum(
        len(response.completion.response_ids)
        for group in groups
        for response in group.responses
        if response.verdict.reward is not None
    )
    parameters = list(policy.parameters())
    if examples:
        batch = collate(examples, config.batch.layout)

        def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
            ref_C = batch.ref_logprobs_N[chunk]
            found: torch.Tensor = token_losses(config.objective, logprobs_C, batch.advantages_N[chunk], ref_C, ref_C)
            return found

        (policy(batch, losses)[0] / num_tokens).backward()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
