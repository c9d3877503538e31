"""Groups for the benchmarks that train a real model: random prompts, and responses that copy a piece of their prompt.

A copy's probability depends on seeing the prompt, so losses would differ if a layout did not show it. Nothing is run
from here. Reference log-probs are the model's own, as `gft generate` stores them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """The groups of a measurement: how long, how many."""

    prompt: int  # tokens
    response: int  # tokens, mean
    responses: int  # of a group
    groups: int  # of a step

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response of a group: from half to one and a half times the mean."""
        steps = max(1, self.responses - 1)
        return [round(self.response * (0.5 + k / steps)) for k in range(self.responses)]

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return self.groups * sum(self.lengths)

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response} x {self.responses}"


def write_data(out: Path, model: str, shape: Shape, zero: list[int], zero_groups: int) -> None:
    """The data sets of one shape: `signal`, all of whose groups have one, and for each n of `zero` a `zero-<n>` of
    `zero_groups` groups, n % of them without."""
    import numpy as np
    import torch

    from gftdata.engines.hf import HfEngine, load_model
    from gftdata.tokens import load_tokenizer
    from gftdata.types import Completion, Group, Message, Prompt, Response, ScoreRequest, Verdict

    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(model)
    allowed = np.setdiff1d(np.arange(len(tokenizer.backend)), tokenizer.backend.all_special_ids).astype(np.int32)
    drawn = []
    for _ in range(shape.groups):
        prompt = rng.choice(allowed, shape.prompt)
        starts = rng.integers(0, shape.prompt, shape.responses)
        pieces = [np.resize(np.roll(prompt, -s), n) for s, n in zip(starts, shape.lengths, strict=True)]
        drawn.append((prompt, pieces))
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    engine = HfEngine(loaded, tokenizer, batch_size=shape.responses, batch_tokens=8192)
    scores = engine.score([ScoreRequest(prompt, piece) for prompt, pieces in drawn for piece in pieces])

    def group(number: int, has_signal: bool) -> Group:
        place = number % shape.groups
        prompt, pieces = drawn[place]
        name = f"{number:016x}"
        messages = (Message("user", name),)
        return Group(
            Prompt(name, name, messages, "", "random", (), "{}", name),
            prompt,
            tuple(
                Response(
                    Completion("self" if k else "expert", f"{name} {k}", piece, "stop", "random", None, None),
                    Verdict(float(k % 2 == 0) if has_signal else 1.0, "ok"),
                    scores[place * shape.responses + k],
                )
                for k, piece in enumerate(pieces)
            ),
        )

    write_shard(out / "signal", model, tokenizer, [group(n, True) for n in range(shape.groups)])
    for share in zero:
        without = zero_groups * share // 100
        groups = [group(n, n >= without) for n in range(zero_groups)]
        write_shard(out / f"zero-{share}", model, tokenizer, groups)


def write_shard(out: Path, model: str, tokenizer: Any, groups: list[Any]) -> None:
    """One shard and a manifest, as `gft generate` would leave them."""
    from gftdata.manifest import DATA, FORMAT, Manifest, ModelRecord, PromptCounts, TokenizerRecord, write_manifest
    from gftdata.models import model_revision
    from gftdata.schema import SCHEMA_VERSION, groups_to_table
    from gftdata.shards import all_records, package_versions, publish_shard, toolkit_version, verify
    from gftdata.store import FolderStore
    from gftdata.summary import summarise

    publish_shard(FolderStore(out), 0, 1, groups_to_table(groups), len(groups), "float32")
    nothing = dict.fromkeys(PromptCounts.model_fields)
    hashes = {name: getattr(tokenizer, name) for name in TokenizerRecord.model_fields}
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=toolkit_version(),
        recipe={},
        models=(ModelRecord(role="reference", name=Path(model).name, revision=model_revision(model)),),
        tokenizer=TokenizerRecord(**hashes),
        engine="none",
        packages=package_versions(),
        prompts=PromptCounts(**{**nothing, "rows_read": len(groups), "prompts": len(groups)}),
        prompts_quarantined=0,
        teacher_samples_left_out=None,
        summary=summarise(sorted((out / DATA).glob("*.parquet"))),
        shards=all_records(FolderStore(out), 1),
    )
    write_manifest(FolderStore(out), manifest)
    if problems := verify(out):
        sys.exit("\n".join(problems))
