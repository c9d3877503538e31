"""The dataset card: manifest -> README.md for the Hub. Pure: it reads no file, asks nobody and invents nothing.

The front matter makes `load_dataset` and the Hub's viewer work. The chart is bars of text: the Hub does not say that it
draws Mermaid in cards, and text is the same on the Hub, on GitHub and in a terminal.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from gftdata.manifest import DATA, Manifest, ModelRecord, SourceSummary
from gftdata.schema import schema

TAGS = ["gft-toolkit", "group-fine-tuning", "post-training", "synthetic"]
SPLIT, BAR = "train", 24
HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
PAPER = "[arXiv:2604.14258](https://arxiv.org/abs/2604.14258)"
COLUMNS = {
    "prompt_id": "sha256 of messages and ground truth; with a number behind it where the same comes again",
    "source_id": "the id that the source of the prompts gave, or null",
    "prompt": "chat messages; the last one is the user's",
    "ground_truth": "what the reward compares with, or null",
    "data_source": "name of the source of the prompts",
    "responses": "text of each response of the group",
    "sources": "who wrote it: `expert`, `teacher:<name>` or `self`",
    "rewards": "its reward; null where it could not be judged",
    "reward_status": "`ok`, or why there is no reward: `timeout`, `error:<kind>`, `no_ground_truth`",
    "finish_reasons": "`stop`, `length` (cut by the limit) or `given` (a text that was not sampled)",
    "num_tokens": "its length in tokens, the token that ends it included",
    "models": "which model wrote it, `name@revision`; `data` for a given text",
    "seeds": "the seed of that sample; null where the engine honours none",
    "ref_logprob_means": "mean of its `ref_logprobs`, nats",
    "num_prompt_tokens": "length of `prompt_ids`",
    "prompt_ids": "tokens of the prompt, what opens the answer included",
    "response_ids": "tokens of each response",
    "ref_logprobs": "log-prob of each of these tokens under the reference model: nats, temperature 1, full vocabulary",
    "behavior_logprobs": "log-prob when it was drawn, at the sampling temperature; null for what was not drawn here",
    "extra": "JSON: what else the source of the prompts carried",
}


def write_card(
    manifest: Manifest,
    repo: str,
    *,
    license: str,
    languages: Sequence[str] = (),
    model_licenses: Mapping[str, str] | None = None,
    logprob_dtype: Literal["float32", "float16"] = "float32",
) -> str:
    """The card of the data set `repo`; `model_licenses` are those that the pages of its models state."""
    front = _front_matter(manifest, repo, license, languages, logprob_dtype)
    parts = [
        f"---\n{front}---",
        f"# {repo.rpartition('/')[2]}",
        *_what_it_is(manifest),
        "## Responses by source",
        _sources_table(manifest.summary.sources),
        _fenced("\n".join(_chart(manifest.summary.sources)), "text"),
        "## Models",
        *_models(manifest, model_licenses or {}, license),
        "## Use it",
        *_use(manifest, repo),
        "## How it was made",
        *_how(manifest),
        "## Columns",
        "Per-response columns run parallel: element k of each speaks of response k.",
        _table(["column", "meaning"], [[f"`{name}`", meaning] for name, meaning in COLUMNS.items()]),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(manifest)),
    ]
    return "\n\n".join(parts) + "\n"


def is_on_the_hub(model: ModelRecord) -> bool:
    """Whether a model's record names a commit on the Hub; that of a local folder or an endpoint does not."""
    return HUB_ID.fullmatch(model.name) is not None and HUB_COMMIT.fullmatch(model.revision) is not None


def _front_matter(
    manifest: Manifest, repo: str, license: str, languages: Sequence[str], logprob_dtype: Literal["float32", "float16"]
) -> str:
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    rows, size = manifest.summary.groups, sum(record.bytes for record in manifest.shards)
    data = DatasetCardData(
        license=license,
        language=list(languages) or None,
        pretty_name=repo.rpartition("/")[2],
        tags=TAGS,
        task_categories=["text-generation"],
        size_categories=[_size_category(rows)],
        configs=[{"config_name": "default", "data_files": [{"split": SPLIT, "path": f"{DATA}/*.parquet"}]}],
    )
    info = DatasetInfo(
        features=Features.from_arrow_schema(schema(logprob_dtype)),
        splits=SplitDict({SPLIT: SplitInfo(SPLIT, num_bytes=size, num_examples=rows)}),
        download_size=size,
        dataset_size=size,
    )
    DatasetInfosDict(default=info).to_dataset_card_data(data)
    return f"{data.to_yaml()}\n"


def _size_category(rows: int) -> str:
    bounds = [("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7), ("100M", 10**8)]
    bounds += [("1B", 10**9), ("10B", 10**10), ("100B", 10**11), ("1T", 10**12)]
    names = ["", *(name for name, _ in bounds)]
    at = sum(rows >= bound for _, bound in bounds)
    return (
        f"n<{bounds[0][0]}" if at == 0 else f"n>{names[-1]}" if at == len(bounds) else f"{names[at]}<n<{names[at + 1]}"
    )


def _what_it_is(manifest: Manifest) -> Iterator[str]:
    summary = manifest.summary
    yield (
        f"Response groups for Group Fine-Tuning ({PAPER}), made with gft-toolkit {_cell(manifest.toolkit_version)}. "
        "One row is one prompt with its whole group of responses: their texts and tokens, the reward of each, and the "
        "log-prob of each token under the model that training starts from. To train on it, neither an engine nor a "
        "reference model is needed."
    )
    prompts = manifest.recipe.get("prompts")
    yield _table(
        ["", ""],
        [
            ["groups", f"{summary.groups:,}"],
            ["responses", f"{summary.responses:,}"],
            ["response tokens", f"{summary.response_tokens:,}"],
            ["groups without signal (all rewards equal)", f"{summary.groups_without_signal:,}"],
            ["prompts from", _cell(_origin(prompts if isinstance(prompts, dict) else {}))],
            ["judged by", _code(_setting(manifest.recipe, "reward", "name", default="not stated"))],
            ["files", f"{len(manifest.shards):,} Parquet files, {_megabytes(manifest)}"],
        ],
    )


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(record.bytes for record in manifest.shards) / 1e6:,.1f} MB"


def _origin(prompts: Mapping[str, Any]) -> str:
    if isinstance(task := prompts.get("reasoning_gym"), dict):
        return f"the reasoning-gym task {task.get('task')}"
    kinds = {"dataset": "the data set", "path": "the file", "reuse": "the earlier data set of groups"}
    named = (f"{kind} {prompts[key]}" for key, kind in kinds.items() if prompts.get(key))
    return next(named, "not stated")


def _sources_table(sources: Sequence[SourceSummary]) -> str:
    head = ["source", "responses", "pass rate", "mean reward", "not judged", "mean tokens", "median", "95 %", "longest"]
    head += ["truncated", "identical"]
    rows = [
        [
            _cell(s.source),
            f"{s.responses:,}",
            _decimal(s.pass_rate),
            _decimal(s.mean_reward),
            f"{s.responses - s.judged:,}",
            f"{s.mean_tokens:,.1f}",
            f"{s.median_tokens:,}",
            f"{s.p95_tokens:,}",
            f"{s.max_tokens:,}",
            f"{s.truncated:,}",
            f"{s.identical:,}",
        ]
        for s in sources
    ]
    return _table(head, rows)


def _chart(sources: Sequence[SourceSummary]) -> Iterator[str]:
    width = max((len(s.source) for s in sources), default=0)
    longest = max((s.mean_tokens for s in sources), default=0.0)
    yield "pass rate (share of judged responses with reward 1)"
    for s in sources:
        yield f"  {s.source:<{width}}  {_bar(s.pass_rate or 0.0)}  {_decimal(s.pass_rate)}"
    yield ""
    yield "mean length (tokens)"
    for s in sources:
        yield f"  {s.source:<{width}}  {_bar(s.mean_tokens / longest if longest else 0.0)}  {s.mean_tokens:,.1f}"


def _bar(share: float) -> str:
    full = round(share * BAR)
    return "█" * full + "·" * (BAR - full)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _models(manifest: Manifest, licenses: Mapping[str, str], license: str) -> Iterator[str]:
    rows = []
    for model in manifest.models:
        name = f"[{_cell(model.name)}](https://huggingface.co/{model.name}/tree/{model.revision})"
        found = licenses.get(model.name)
        if not is_on_the_hub(model):
            name, said = _code(model.name), "not stated: not a model of the Hub"
        else:
            said = f"{_cell(found)} (says the model's page)" if found else "not stated; look at the model's page"
        rows.append([_cell(model.role), name, _code(model.revision[:12]), said])
    yield _table(["role", "model", "revision", "licence"], rows)
    yield (
        f"`reference` gives the log-probs, `self` is the model that training starts from. The licence of this data "
        f"set, {license}, is the choice of who shared it; models and prompts have licences of their own."
    )


def _use(manifest: Manifest, repo: str) -> Iterator[str]:
    reference = next((model.name for model in manifest.models if model.role == "reference"), "the starting model")
    train: dict[str, Any] = {"model": reference, "data": f"hf://datasets/{repo}", "out": "runs/gft"}
    if manifest.summary.groups_unjudged:
        train["unjudged_groups"] = "skip"
    yield "To train on it, `train.yaml`:"
    yield _fenced(_yaml(train), "yaml")
    yield _fenced(f"{_install(manifest)}\ngft train train.yaml", "sh")
    yield "To have it as files, every checksum compared, and to look at it:"
    yield _fenced(f"gft pull {repo} {repo.rpartition('/')[2]}\ngft validate {repo.rpartition('/')[2]}", "sh")
    yield _fenced(f'from datasets import load_dataset\n\nrows = load_dataset("{repo}", split="{SPLIT}")', "python")


def _install(manifest: Manifest) -> str:
    """As a command that people copy: of a manifest from elsewhere only what is a version gets into it."""
    version = manifest.toolkit_version
    return f"pip install gft-toolkit{f'=={version}' if re.fullmatch(r'[0-9][0-9A-Za-z.+]*', version) else ''}"


def _how(manifest: Manifest) -> Iterator[str]:
    yield "To make it again, with this as `generate.yaml`:"
    yield _fenced(_yaml(_without_none(manifest.recipe)), "yaml")
    yield _fenced(f"{_install(manifest)}\ngft generate generate.yaml --out data", "sh")
    notes = ["Of files and folders only the last part of their names is there: put your own paths."]
    if {"server", "openai"} & set(_engines(manifest.recipe)):
        notes.append("Addresses of servers and keys are not in it: add `urls`, or `base_url` and `api_key_env`.")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.packages.items())
    notes.append(f"It was made with the engine {_code(manifest.engine)} and {_cell(versions)}.")
    yield " ".join(notes)
    if manifest.derived:
        yield (
            "It was then derived from earlier data sets, in this order; `sources` are the sha256 of the manifests "
            "that were read."
        )
        steps = [
            {"by": f"gft {step.by}", "settings": step.settings, "sources": list(step.sources)}
            for step in manifest.derived
        ]
        yield _fenced(_yaml(steps), "yaml")


def _limits(manifest: Manifest) -> Iterator[str]:
    summary, counts = manifest.summary, manifest.prompts
    own = next((model for model in manifest.models if model.role == "self"), None)
    if own is not None:
        yield (
            f"Responses of `self` were drawn once, from {_code(own.name)} at revision {_code(own.revision[:12])}: they "
            "go stale as a model moves in training, and say less of any other model."
        )
    yield (
        "The log-probs are those of the reference model, and the tokens those of its tokenizer: for another model "
        "there is `gft rescore` (the same tokenizer) or `prompts: {reuse: ...}` (another)."
    )
    unjudged = sum(s.responses - s.judged for s in summary.sources)
    truncated = sum(s.truncated for s in summary.sources)
    limit = _setting(manifest.recipe, "responses", "max_tokens", default="the limit")
    reward = _setting(manifest.recipe, "reward", "name", default="a reward")
    yield f"Rewards are what {_code(reward)} says of the text: an automatic judgement, which errs in both directions."
    yield (
        f"{unjudged:,} of {summary.responses:,} responses could not be judged and have a null reward, never 0; of "
        f"{summary.groups_unjudged:,} groups no response could be judged."
    )
    yield f"{truncated:,} responses were cut at the limit of {limit} tokens, and judged as they stand."
    yield (
        f"{manifest.prompts_quarantined:,} prompts were given up by the engine and are left out"
        f"{' (quarantine.jsonl)' if manifest.prompts_quarantined else ''}."
    )
    left_out = {
        "prompts longer than the limit": counts.prompts_too_long,
        "prompts that came before, exactly or almost": counts.duplicates_removed,
        "prompts that share 8 words in a row with an evaluation set": counts.contaminated,
        "given texts too long or empty": counts.given_left_out,
        "given texts that were not there": counts.given_missing,
        "samples of teachers that were empty or too long": manifest.teacher_samples_left_out,
    }
    yield "Left out: " + ", ".join(f"{_counted(count)} {what}" for what, count in left_out.items()) + "."
    if not manifest.recipe.get("decontaminate"):
        yield "No evaluation set was named to keep the prompts apart from."
    yield "Texts of models can be wrong, unfair or offensive; nothing here leaves them out."


def _counted(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def _engines(value: Any) -> Iterator[str]:
    """Names of all engines in a recipe."""
    if isinstance(value, dict):
        engine = value.get("engine")
        if isinstance(engine, dict):
            yield str(engine.get("name"))
        for item in value.values():
            yield from _engines(item)
    elif isinstance(value, list):
        for item in value:
            yield from _engines(item)


def _setting(recipe: Mapping[str, Any], *keys: str, default: str) -> str:
    value: Any = recipe
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else str(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip("\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text as it is, wherever it came from: nothing in it makes markup of a cell."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
