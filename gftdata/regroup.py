"""Derived data sets that hold some groups of others, each row as it was: merge, filter, split.

Only short columns are read to choose; `derive.py` writes. Shapes: G groups, R responses.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gftdata.config import recipe_differences
from gftdata.derive import Job, Source, make_job, read_source, read_table
from gftdata.errors import UserError
from gftdata.extend import RECIPES_DIFFER, comparable, drawn_counts
from gftdata.index import Index, read_index
from gftdata.manifest import ModelRecord, PromptCounts

Bools = npt.NDArray[np.bool_]


def plan_merge(
    data: Sequence[Path],
    out: Path,
    *,
    duplicates: Literal["error", "first"] = "error",
    groups_per_shard: int | None = None,
) -> Job:
    """All groups of several data sets, in their order; of a prompt that is in two, `first` keeps the first one's.

    Raises UserError where the data sets are not of one kind, and for prompts that are in two, unless told otherwise.
    """
    sources = [read_source(folder) for folder in data]
    check_same_kind(sources)
    index = read_index([path for source in sources for path in source.paths])
    seen: set[str] = set()
    kept_G = np.zeros(index.num_groups, bool)
    for number, prompt_id in enumerate(_values(index, "prompt_id")):
        kept_G[number] = prompt_id not in seen
        seen.add(prompt_id)
    repeated = int((~kept_G).sum())
    if repeated and duplicates == "error":
        raise UserError(
            f"{repeated:,} of {len(kept_G):,} groups are of a prompt that an earlier one of these data sets has too; "
            "--duplicates first keeps the first one's"
        )
    manifests = [source.manifest for source in sources]
    models: dict[tuple[str, str], ModelRecord] = {}
    for record in (record for manifest in manifests for record in manifest.models):
        models.setdefault((record.role, record.revision), record)  # one model may go by two names
    changes = {
        "models": tuple(models.values()),
        "prompts": added_counts([manifest.prompts for manifest in manifests]),
        "teacher_samples_left_out": _added([manifest.teacher_samples_left_out for manifest in manifests]),
        "derived": tuple(step for manifest in manifests for step in manifest.derived),
    }
    left_out = {"whose prompt is in an earlier data set": repeated}
    settings: dict[str, Any] = {"duplicates": duplicates}
    kinds = [comparable(m.recipe) | {"counts": drawn_counts(m.recipe)} for m in manifests]
    if differing := [found for kind in kinds[1:] if (found := recipe_differences(kinds[0], kind))]:
        settings[RECIPES_DIFFER] = differing
    return _choose("merge", sources, out, settings, index, kept_G, left_out, groups_per_shard, changes)


def check_same_kind(sources: Sequence[Source]) -> None:
    """Raise UserError unless tokens and log-probs of all data sets mean the same."""
    kinds = [_kind(source) for source in sources]
    differing = [
        f"the {what} of {source.folder} is {kind[what]}, of {sources[0].folder} {kinds[0][what]}"
        for source, kind in zip(sources, kinds, strict=True)
        for what in kind
        if kind[what] != kinds[0][what]
    ]
    if differing:
        raise UserError(
            f"cannot be merged: {'; '.join(differing)}; `gft rescore` gives a data set another reference model, "
            "`gft generate` with prompts.reuse all the rest"
        )


def _kind(source: Source) -> dict[str, str]:
    tokenizer = source.manifest.tokenizer
    reference = [record.revision for record in source.manifest.models if record.role == "reference"]
    return {
        "tokenizer": tokenizer.hash[:16],
        "chat template": tokenizer.template_hash[:16],
        "end token": str(tokenizer.end_id),
        "revision of the reference model": "".join(reference)[:16],
        "log-prob dtype": source.logprob_dtype,
    }


def added_counts(counts: Sequence[PromptCounts]) -> PromptCounts:
    """Field by field; what one data set did not count (None) is not known of all together."""
    fields = {name: [getattr(count, name) for count in counts] for name in PromptCounts.model_fields}
    return PromptCounts.model_validate({name: _added(values) for name, values in fields.items()})


def _added(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def part_of(index: Index, kept_G: Bools) -> dict[str, Any]:
    """The counts of a part of a data set: what became of rows before is said by the whole's manifest."""
    kept = int(kept_G.sum())
    counts = dict.fromkeys(PromptCounts.model_fields) | {"rows_read": kept, "prompts": kept}
    return {"prompts": PromptCounts.model_validate(counts), "teacher_samples_left_out": None}


def plan_filter(
    data: Path,
    out: Path,
    *,
    min_pass: float = 0.0,
    max_pass: float = 1.0,
    names: Sequence[str] = (),
    with_signal: bool = False,
    groups_per_shard: int | None = None,
) -> Job:
    """Groups whose pass rate is in [min_pass, max_pass] and, `with_signal`, whose judged rewards are not all equal.

    The pass rate is the share with reward 1 of the judged responses, of the sources in `names` or else of all.
    """
    if not 0.0 <= min_pass <= max_pass <= 1.0:
        raise UserError(f"pass rates from {min_pass:g} to {max_pass:g}: expected 0 <= --min-pass <= --max-pass <= 1")
    source = read_source(data)
    index = read_index(source.paths)
    if unknown := [name for name in names if name not in index.source_names]:
        raise UserError(f"{data}: no responses of source `{unknown[0]}`; it has: {', '.join(index.source_names)}")
    asked = [code for code, name in enumerate(index.source_names) if not names or name in names]
    rates_G = pass_rates(index, np.isin(index.source_codes, asked))
    in_range_G = (rates_G >= min_pass) & (rates_G <= max_pass)
    silent_G = ~signal(index) if with_signal else np.zeros(index.num_groups, bool)
    left_out = {
        "without a judged response" + (f" of {', '.join(names)}" if names else ""): int(np.isnan(rates_G).sum()),
        f"with a pass rate below {min_pass:g}": int((rates_G < min_pass).sum()),
        f"with a pass rate above {max_pass:g}": int((rates_G > max_pass).sum()),
        "whose rewards are all equal": int((in_range_G & silent_G).sum()),
    }
    settings = {"min_pass": min_pass, "max_pass": max_pass, "sources": sorted(names), "with_signal": with_signal}
    kept_G = in_range_G & ~silent_G
    changes = part_of(index, kept_G)
    return _choose("filter", [source], out, settings, index, kept_G, left_out, groups_per_shard, changes)


def pass_rates(index: Index, asked_R: Bools) -> npt.NDArray[np.float64]:
    """[G] share with reward 1 of each group's judged responses among the asked ones; NaN where there is none."""
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    judged_G = np.bincount(group_R[asked_R & ~np.isnan(index.rewards)], minlength=index.num_groups)
    passed_G = np.bincount(group_R[asked_R & (index.rewards == 1.0)], minlength=index.num_groups)
    return np.where(judged_G > 0, passed_G / np.maximum(judged_G, 1), np.nan)


def signal(index: Index) -> Bools:
    """[G] whether the judged rewards of a group are not all equal."""
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    lowest_G, highest_G = (np.full(index.num_groups, bound, np.float32) for bound in (np.inf, -np.inf))
    np.fmin.at(lowest_G, group_R, index.rewards)
    np.fmax.at(highest_G, group_R, index.rewards)
    return lowest_G < highest_G


def plan_split(
    data: Path, out_a: Path, out_b: Path, *, share: float, seed: int = 0, groups_per_shard: int | None = None
) -> tuple[Job, Job]:
    """About `share` of the prompts to one data set and the others to a second, as `position` says."""
    if not 0.0 < share < 1.0:
        raise UserError(f"--share {share:g}: expected the share of prompts for --out-a, between 0 and 1")
    a, b = out_a.resolve(), out_b.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"--out-a {out_a} and --out-b {out_b}: name two folders, neither inside the other")
    source = read_source(data)
    index = read_index(source.paths)
    in_a_G = np.fromiter((position(seed, chat) < share for chat in _values(index, "prompt")), bool, index.num_groups)

    def side(name: str, out: Path, kept_G: Bools) -> Job:
        settings = {"share": share, "seed": seed, "side": name}
        left_out = {"on the other side": int((~kept_G).sum())}
        changes = part_of(index, kept_G)
        return _choose("split", [source], out, settings, index, kept_G, left_out, groups_per_shard, changes)

    return side("a", out_a, in_a_G), side("b", out_b, ~in_a_G)


def position(seed: int, messages: Sequence[Mapping[str, str]]) -> float:
    """Where in [0, 1) a prompt stands: sha256 over the seed and its messages, so it is the same in every data set."""
    chat = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
    digest = hashlib.sha256(f"{seed}\n{chat}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _values(index: Index, column: str) -> Iterator[Any]:
    """A column of all groups, read row group by row group."""
    keys = dict.fromkeys(zip(index.path_of_group.tolist(), index.row_group_of_group.tolist(), strict=True))
    for path, row_group in keys:
        yield from read_table(index.paths[path], row_group, [column])[column].to_pylist()


def _choose(
    by: str,
    sources: Sequence[Source],
    out: Path,
    settings: dict[str, Any],
    index: Index,
    kept_G: Bools,
    left_out: Mapping[str, int],
    groups_per_shard: int | None,
    changes: Mapping[str, Any] | None = None,
) -> Job:
    """The job that takes the kept groups and cuts them into shards anew."""
    size, groups = groups_per_shard or sources[0].sizes.groups_per_shard, np.flatnonzero(kept_G)
    if not len(groups):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        raise UserError(f"{out}: none of {index.num_groups:,} groups would be in it ({reasons}); ask for less")
    parts = [groups[start : start + size] for start in range(0, len(groups), size)]
    cut = settings | {"groups_per_shard": size, "left_out": {name: n for name, n in left_out.items() if n}}
    return make_job(by, sources, out, cut, index, parts, changes or {}, left_out=left_out)
