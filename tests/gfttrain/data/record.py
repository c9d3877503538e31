"""Records what the authors' formula is checked on: the demo's model on a few of its own groups.

    PYTHONPATH=tests python tests/gfttrain/data/record.py    # writes recorded.safetensors beside this file

R responses of four groups: two whose rewards differ, one without signal, and one of a single response. W positions of
a row (prompt, response, padding), T response tokens of the longest, V vocabulary. Samples depend on the machine that
draws them, so the file is kept; the logits are what transformers itself gives for its ids, in float32.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from aid.demo_data import DEMO, make_demo_data
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gftdata.manifest import read_manifest
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths
from gftdata.types import Group, Response

RECORDED = Path(__file__).with_name("recorded.safetensors")


def chosen(groups: list[Group]) -> list[tuple[Group, tuple[Response, ...]]]:
    """The four groups, and which of their responses."""

    def rewards(group: Group) -> set[float | None]:
        return {response.verdict.reward for response in group.responses}

    mixed = [group for group in groups if len(rewards(group)) > 1]
    equal = next(group for group in groups if len(rewards(group)) == 1)
    whole = [(group, group.responses) for group in (*mixed[:2], equal)]
    return [*whole, (mixed[2], mixed[2].responses[:1])]


@torch.no_grad()
def record(groups: list[tuple[Group, tuple[Response, ...]]]) -> dict[str, torch.Tensor]:
    rows = [(g, n, r) for n, (g, responses) in enumerate(groups) for r in responses]
    prompts = torch.tensor([len(g.prompt_ids) for g, _, _ in rows])
    lengths = torch.tensor([len(r.completion.response_ids) for _, _, r in rows])
    ids_RW = torch.zeros(len(rows), int((prompts + lengths).max()), dtype=torch.long)
    for row, (group, _, response) in enumerate(rows):
        both = np.concatenate([group.prompt_ids, response.completion.response_ids])
        ids_RW[row, : len(both)] = torch.from_numpy(both.astype(np.int64))
    real_RW = torch.arange(ids_RW.shape[1]) < (prompts + lengths)[:, None]
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    logits_RWV = model(input_ids=ids_RW, attention_mask=real_RW.long(), use_cache=False).logits
    places_RT = prompts[:, None] + torch.arange(int(lengths.max()))
    mask_RT = torch.arange(int(lengths.max())) < lengths[:, None]
    places_RT = torch.where(mask_RT, places_RT, prompts[:, None])
    rewards = [r.verdict.reward for _, _, r in rows]
    return {
        "input_ids_RW": ids_RW.to(torch.int32),
        "prompt_tokens_R": prompts.to(torch.int32),
        "logits_RTV": logits_RWV[torch.arange(len(rows))[:, None], places_RT - 1].contiguous(),
        "targets_RT": ids_RW.gather(1, places_RT).to(torch.int32),
        "mask_RT": mask_RT,
        "rewards_R": torch.tensor(rewards, dtype=torch.float32),
        "group_R": torch.tensor([n for _, n, _ in rows], dtype=torch.int32),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = make_demo_data(Path(folder), 32)
        paths = shard_paths(data, read_manifest(data))
        found = record(chosen([group for path in paths for group in table_to_groups(pq.read_table(path))]))
    save_file(found, RECORDED)
    print({name: tuple(tensor.shape) for name, tensor in found.items()}, RECORDED.stat().st_size, "bytes")
    print("rewards", found["rewards_R"].tolist(), "groups", found["group_R"].tolist())
