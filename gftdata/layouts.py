"""One group -> the rows that TRL and verl train from, and their schemas. Pure; `exports.py` reads and writes.

DPO pairs: of the judged responses of a group, the first with the highest reward is chosen and the first with the lowest
rejected; with `pairs: all`, any two whose rewards differ. `ref_*_logps` are the sums, over a response's tokens and in
nats, of the stored reference log-probs: what TRL's DPO computes when it has a reference model.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pyarrow as pa

from gftdata.imports import ANSWER, MODEL_ANSWER, TRUTH, VERL, look
from gftdata.types import EXPERT, TEACHER_PREFIX

IGNORED = -100  # the label of a token that is not in the loss
FORMATS = ("verl", "trl-sft", "trl-dpo", "trl-kto", "trl-grpo")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported. A setting that the format has no use for is refused."""

    sources: tuple[str, ...] = ()  # `teacher` means every teacher; none: the expert for SFT, all for DPO and KTO
    min_reward: float | None = None  # SFT: lower is left out; DPO: of the chosen one; KTO: label true from here (1)
    pairs: Literal["one", "all"] = "one"  # DPO, of each group
    tokens: bool = False  # SFT, DPO: token ids in place of texts
    truncated: bool = False  # also responses that the length limit cut, to which TRL adds an end token


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response of a group."""

    text: str
    source: str
    reward: float | None
    is_truncated: bool
    model: str
    ref_logp: float  # nats, summed over its tokens
    response_ids: tuple[int, ...]  # [T], empty where they are not exported


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group as far as it is exported."""

    number: int  # in the data set, from 0
    prompt_id: str
    source_id: str | None
    messages: tuple[Mapping[str, str], ...]
    ground_truth: str | None
    data_source: str
    extra: str
    prompt_ids: tuple[int, ...]  # [P], empty where they are not exported
    responses: tuple[Candidate, ...]


MakeRows = Callable[[GroupRow, Counter[str]], Iterator[dict[str, Any]]]  # what is left out is added to the counter


def rows_of(kind: str, options: ExportOptions, sources: frozenset[str], is_chat: bool) -> MakeRows:
    """What turns a group into rows. `is_chat`: prompts and responses are messages, not plain texts."""

    def make(group: GroupRow, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        if kind == "verl":
            yield verl_row(group, left_out)
            return
        chat = [dict(message) for message in group.messages]
        facts = {name: getattr(group, name) for name in ("prompt_id", "data_source", "ground_truth", "extra")}
        prompt = {"prompt": chat if is_chat else chat[-1]["content"]}
        if kind == "trl-grpo":
            left_out["responses: GRPO draws its own"] += len(group.responses)
            yield prompt | facts
            return
        usable = list(_usable(group, kind, options, sources, left_out))
        if kind == "trl-sft":
            for r in usable:
                yield _sft(group, r, prompt, is_chat, options.tokens) | _told(r) | facts
        elif kind == "trl-kto":
            for r in usable:
                label = r.reward is not None and r.reward >= (1.0 if options.min_reward is None else options.min_reward)
                yield prompt | {"completion": _said(r, is_chat), "label": label} | _told(r) | facts
        else:
            for chosen, rejected in pairs_of(usable, options, left_out):
                told = _told(chosen, "chosen_") | _told(rejected, "rejected_")
                yield _dpo(group, chosen, rejected, prompt, is_chat, options.tokens) | told | facts

    return make


def _usable(
    group: GroupRow, kind: str, options: ExportOptions, sources: frozenset[str], left_out: Counter[str]
) -> Iterator[Candidate]:
    for r in group.responses:
        if r.source not in sources:
            left_out[f"responses of {r.source} (--source)"] += 1
        elif r.reward is None and not (kind == "trl-sft" and options.min_reward is None):
            left_out["responses that could not be judged"] += 1
        elif kind == "trl-sft" and options.min_reward is not None and (r.reward or 0.0) < options.min_reward:
            left_out[f"responses with a reward below {options.min_reward:g}"] += 1
        elif r.is_truncated and not (options.truncated or options.tokens):
            left_out["responses cut by the length limit, which TRL would end (--truncated keeps them)"] += 1
        else:
            yield r


def pairs_of(
    usable: list[Candidate], options: ExportOptions, left_out: Counter[str]
) -> Iterator[tuple[Candidate, Candidate]]:
    """(chosen, rejected) of one group, all of whose candidates are judged."""
    rewards = [r.reward for r in usable if r.reward is not None]
    if len(rewards) < 2:
        left_out["groups with fewer than two such responses"] += 1
        return
    lowest, highest = min(rewards), max(rewards)
    if lowest == highest:
        left_out["groups whose rewards are all equal"] += 1
        return
    bound = lowest if options.min_reward is None else options.min_reward
    if highest < bound:
        left_out[f"groups whose best reward is below {bound:g}"] += 1
        return
    if options.pairs == "one":
        pairs = [(usable[rewards.index(highest)], usable[rewards.index(lowest)])]
    else:
        places = product(range(len(usable)), repeat=2)
        pairs = [(usable[i], usable[j]) for i, j in places if rewards[i] > rewards[j] and rewards[i] >= bound]
    left_out["responses in no pair"] += len(usable) - len({id(r) for pair in pairs for r in pair})
    yield from pairs


def _said(r: Candidate, is_chat: bool) -> Any:
    return [{"role": "assistant", "content": r.text}] if is_chat else r.text


def _told(r: Candidate, before: str = "") -> dict[str, Any]:
    return {f"{before}source": r.source, f"{before}reward": r.reward, f"{before}model": r.model}


def _sft(group: GroupRow, r: Candidate, prompt: dict[str, Any], is_chat: bool, tokens: bool) -> dict[str, Any]:
    if not tokens:
        return prompt | {"completion": _said(r, is_chat)}
    # labels, for TRL heeds a completion_mask only with completion_only_loss=True, which is not its default here
    labels = [IGNORED] * len(group.prompt_ids) + [*r.response_ids]
    return {"input_ids": [*group.prompt_ids, *r.response_ids], "labels": labels}


def _dpo(
    group: GroupRow, chosen: Candidate, rejected: Candidate, prompt: dict[str, Any], is_chat: bool, tokens: bool
) -> dict[str, Any]:
    logps = {"ref_chosen_logps": chosen.ref_logp, "ref_rejected_logps": rejected.ref_logp}
    if not tokens:
        return prompt | {"chosen": _said(chosen, is_chat), "rejected": _said(rejected, is_chat)} | logps
    ids = {"chosen_ids": chosen.response_ids, "rejected_ids": rejected.response_ids}
    return {"prompt_ids": group.prompt_ids} | ids | logps


def trl_schema(kind: str, is_chat: bool, tokens: bool) -> pa.Schema:
    """Columns of a TRL export: first the trainer's, then what tells where a row came from."""
    text, real, ids = pa.string(), pa.float64(), pa.list_(pa.int32())
    said = pa.list_(pa.struct([("role", text), ("content", text)])) if is_chat else text

    def told(before: str = "") -> list[tuple[str, pa.DataType]]:
        return [(f"{before}source", text), (f"{before}reward", pa.float32()), (f"{before}model", text)]

    columns: dict[str, list[tuple[str, pa.DataType]]] = {
        "trl-sft": [("input_ids", ids), ("labels", ids)] if tokens else [("prompt", said), ("completion", said)],
        "trl-dpo": [
            *([(name, ids) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] if tokens else []),
            *([] if tokens else [(name, said) for name in ("prompt", "chosen", "rejected")]),
            ("ref_chosen_logps", real),
            ("ref_rejected_logps", real),
        ],
        "trl-kto": [("prompt", said), ("completion", said), ("label", pa.bool_())],
        "trl-grpo": [("prompt", said)],
    }
    origin = {"trl-dpo": [*told("chosen_"), *told("rejected_")], "trl-grpo": []}.get(kind, told())
    facts = [(name, text) for name in ("prompt_id", "data_source", "ground_truth", "extra")]
    return pa.schema([*columns[kind], *origin, *facts])


def verl_row(group: GroupRow, left_out: Counter[str]) -> dict[str, Any]:
    """A row as verl and the authors' loader read it; what `gft import` kept of a row is put back as it was."""
    extra = json.loads(group.extra)
    kept = extra.get(VERL) if isinstance(extra.get(VERL), dict) else None
    experts = [r.text for r in group.responses if r.source == EXPERT]
    teachers = [r.text for r in group.responses if r.source.startswith(TEACHER_PREFIX)]
    left_out["responses of self"] += len(group.responses) - len(experts) - len(teachers)
    made: dict[str, Any] = {
        "data_source": group.data_source,
        "prompt": [dict(message) for message in group.messages],
        "ability": "",
        "reward_model": {"style": "rule", "ground_truth": group.ground_truth},
        "extra_info": {
            "split": "train",
            "index": group.number,
            "question": group.messages[-1]["content"],
            "prompt_id": group.prompt_id,
            "source_id": group.source_id,
            "extra": group.extra,
        },
    }
    if kept is not None:
        made = {name: made[name] for name in ("data_source", "prompt")} | kept["row"]
    if group.ground_truth is not None:
        _put(made, TRUTH, group.ground_truth)
    places = kept or {}
    if experts and _put(made, places.get("expert") or ANSWER, experts[0]):
        experts = experts[1:]
    if teachers and _put(made, places.get("teacher") or MODEL_ANSWER, teachers):
        teachers = []
    left_out["responses of expert, for which a row has one place"] += len(experts)
    left_out["responses of teachers, whose place the row itself has filled"] += len(teachers)
    return made


def _put(row: dict[str, Any], place: str, value: Any) -> bool:
    """Put a value where there is none; whether there was none."""
    *parents, name = place.split(".")
    if look(row, place) is not None:
        return False
    for part in parents:
        row[part] = row.get(part) or {}
        row = row[part]
    row[name] = value
    return True
