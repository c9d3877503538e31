"""The card: a manifest in, markdown out, with front matter that `datasets` reads and YAML that our commands take."""

import re
from typing import Any

import pytest
import yaml

from gftdata.card import COLUMNS, is_on_the_hub, write_card
from gftdata.config import GenerateConfig, validate_config
from gftdata.manifest import Manifest, ModelRecord
from gftdata.schema import schema
from gfttrain.config import TrainConfig

CONFIG: dict[str, Any] = {
    "model": "org/start",
    "out": "x",
    "prompts": {"dataset": "org/prompts", "columns": {"ground_truth": "answer", "expert": "solution"}},
    "reward": {"name": "pkg.mod:judge"},
    "responses": {
        "teachers": [
            {"name": "far", "model": "big", "count": 1, "engine": {"name": "openai"}, "template": "{question}\n```\n|"}
        ],
        "max_tokens": 512,
    },
}


def source(name: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "source": name,
        "responses": 2000,
        "judged": 1990,
        "mean_reward": 0.5,
        "pass_rate": 0.5,
        "finish_reasons": {"stop": 1995, "length": 5},
        "mean_tokens": 100.0,
        "median_tokens": 90,
        "p95_tokens": 300,
        "max_tokens": 512,
        "truncated": 5,
        "identical": 3,
        "groups_all_identical": 0,
        "mean_ref_logprob": -0.5,
    }
    return values | changes


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "format": "gft-groups",
        "schema_version": 1,
        "toolkit_version": "0.1.0",
        "recipe": validate_config(GenerateConfig, CONFIG, "test").recipe(),
        "models": [
            {"role": "reference", "name": "org/start", "revision": "a" * 40},
            {"role": "self", "name": "org/start", "revision": "a" * 40},
            {"role": "teacher:far", "name": "big", "revision": "endpoint"},
        ],
        "tokenizer": {"hash": "", "template_hash": "", "end_id": 1, "stop_ids": [1]},
        "engine": "hf 5",
        "packages": {"torch": "2.13.0"},
        "prompts": {
            "rows_read": 1010,
            "prompts": 1003,
            "prompts_too_long": 7,
            "duplicates": 0,
            "near_duplicates": None,
            "duplicates_removed": None,
            "contaminated": 0,
            "given_missing": 0,
            "given_left_out": 11,
        },
        "prompts_quarantined": 3,
        "teacher_samples_left_out": 13,
        "summary": {
            "groups": 1000,
            "responses": 4000,
            "response_tokens": 400_000,
            "groups_without_signal": 100,
            "groups_unjudged": 2,
            "sources": [
                source("expert", pass_rate=1.0, mean_tokens=200.0, truncated=0),
                source("self", judged=0, pass_rate=None, mean_reward=None),
            ],
        },
        "shards": [
            {"name": f"s{i}.parquet", "sha256": "0" * 64, "rows": 500, "response_tokens": 9, "bytes": 10**6}
            for i in range(2)
        ],
    }
    return Manifest.model_validate(values | changes)


def card(found: Manifest | None = None, **options: Any) -> str:
    return write_card(found or manifest(), "someone/my-groups", **{"license": "mit", **options})


def front_matter(text: str) -> dict[str, Any]:
    front = yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.S)[1])  # type: ignore[index]
    assert isinstance(front, dict)
    return front


def blocks(text: str, language: str) -> list[str]:
    return [found[1] for found in re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.M | re.S)]


def test_the_front_matter() -> None:
    front = front_matter(card(languages=("en", "de")))
    assert (front["license"], front["language"], front["size_categories"]) == ("mit", ["en", "de"], ["1K<n<10K"])
    assert front["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    assert "gft-toolkit" in front["tags"] and front["task_categories"] == ["text-generation"]
    info = front["dataset_info"]
    assert info["splits"] == [{"name": "train", "num_bytes": 2 * 10**6, "num_examples": 1000}]
    assert [feature["name"] for feature in info["features"]] == schema().names
    assert "language" not in front_matter(card())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_its_features_are_the_schema(dtype: Any) -> None:
    from datasets import Features

    features = Features._from_yaml_list(front_matter(card(logprob_dtype=dtype))["dataset_info"]["features"])
    assert features == Features.from_arrow_schema(schema(dtype))


@pytest.mark.parametrize(
    ("groups", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**12, "n>1T"), (999_999, "100K<n<1M")],
)
def test_size_categories(groups: int, category: str) -> None:
    summary = manifest().summary.model_copy(update={"groups": groups})
    assert front_matter(card(manifest().model_copy(update={"summary": summary})))["size_categories"] == [category]


def test_every_column_is_explained() -> None:
    assert list(COLUMNS) == schema().names
    assert all(f"| `{name}` |" in card() for name in schema().names)


def test_the_commands_of_the_card_are_taken() -> None:
    train, recipe = blocks(card(), "yaml")
    config = validate_config(TrainConfig, yaml.safe_load(train), "card")
    assert (config.model, config.data) == ("org/start", ("hf://datasets/someone/my-groups",))
    assert config.unjudged_groups == "skip"
    again = validate_config(GenerateConfig, {**yaml.safe_load(recipe), "out": "x"}, "card")
    assert again.recipe() == manifest().recipe
    assert [part.splitlines()[-1] for part in blocks(card(), "sh")] == [
        "gft train train.yaml",
        "gft validate my-groups",
        "gft generate generate.yaml --out data",
    ]


def test_pass_rates_and_lengths_in_a_table_and_a_chart() -> None:
    text = card()
    assert "| expert | 2,000 | 1.000 | 0.500 | 10 | 200.0 | 90 | 300 | 512 | 0 | 3 |" in text
    assert "| self | 2,000 | - | - | 2,000 | 100.0 | 90 | 300 | 512 | 5 | 3 |" in text
    (chart,) = blocks(text, "text")
    lines = chart.splitlines()
    assert lines[1] == f"  expert  {'█' * 24}  1.000" and lines[2] == f"  self    {'·' * 24}  -"
    assert lines[5] == f"  expert  {'█' * 24}  200.0" and lines[6] == f"  self    {'█' * 12}{'·' * 12}  100.0"


def test_models_are_named_and_licences_never_invented() -> None:
    text = card(model_licenses={"org/start": "apache-2.0"})
    link = f"[org/start](https://huggingface.co/org/start/tree/{'a' * 40})"
    assert f"| self | {link} | `aaaaaaaaaaaa` | apache-2.0 (says the model's page) |" in text
    assert "| teacher:far | `big` | `endpoint` | not stated: not a model of the Hub |" in text
    assert card().count("not stated; look at the model's page") == 2
    assert not is_on_the_hub(ModelRecord(role="self", name="org/x", revision="b" * 64))
    assert not is_on_the_hub(ModelRecord(role="self", name="a/b/c", revision="b" * 40))


def test_limits_are_counted() -> None:
    text = card()
    for said in (
        "from `org/start` at revision `aaaaaaaaaaaa`",
        "2,010 of 4,000 responses could not be judged",
        "of 2 groups no response could be judged",
        "5 responses were cut at the limit of 512 tokens",
        "3 prompts were given up by the engine and are left out (quarantine.jsonl)",
        "7 prompts longer than the limit, an unknown number of prompts that came before",
        "11 given texts too long or empty",
        "13 samples of teachers",
        "No evaluation set was named",
        "Addresses of servers and keys are not in it",
        "what `pkg.mod:judge` says",
    ):
        assert said in text, said


def test_derived_data_sets_say_from_what() -> None:
    assert "derived from earlier data sets" not in card()
    step = {"by": "filter", "settings": {"min_pass": 0.1}, "sources": ["f" * 64], "toolkit_version": "0.1.0"}
    text = card(manifest(derived=[step]))
    assert yaml.safe_load(blocks(text, "yaml")[-1]) == [
        {"by": "gft filter", "settings": {"min_pass": 0.1}, "sources": ["f" * 64]}
    ]


def test_nothing_in_a_manifest_becomes_markup_or_breaks_the_card() -> None:
    nasty = "x | <script>\n# [y](http://z) `"
    summary = manifest().summary.model_dump() | {"sources": [source(nasty)]}
    models = [{"role": nasty, "name": nasty, "revision": nasty}]
    text = card(
        manifest(summary=summary, models=models, toolkit_version="1; rm x", recipe={"prompts": {"dataset": nasty}})
    )
    body = re.sub(r"(`{3,}).*?\n\1", "", text.split("---\n", 2)[2], flags=re.S).replace("\\`", "")
    plain = re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)<script|\n# \[y|(?<!\\)\]\(http://z\)", plain)
    assert all("rm x" not in block for block in blocks(text, "sh"))
    assert card(manifest(recipe={})) and card(manifest(recipe={"prompts": None, "responses": [1]}))
