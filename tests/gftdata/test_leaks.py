"""What must not leave this machine is found, by its key, and nothing else is."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from gftdata.config import GenerateConfig, validate_config
from gftdata.leaks import Private, find_leaks, find_secret, private_here
from gftdata.models import shareable, shown_name

PRIVATE = Private({"MY_API_KEY": "correct-horse"}, ("/srv/people/me", "/root"), ("gpu-17", "gpu-17.example.org"))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("x correct-horse y", "the value of MY_API_KEY"),
        ("hf_" + "a1B2" * 8, "what looks like a token"),
        ("sk-proj-" + "a1B2" * 8, "what looks like a token"),
        ("AKIAABCDEFGHIJKLMNOP", "what looks like a token"),
        ("Bearer abcdefgh12345", "what looks like a token"),
        ("postgres://me:secret@db/x", "a password in a URL"),
        ("/srv/people/me", "a path of this machine"),
        ("see /srv/people/me/data.", "a path of this machine"),
        ("/root/x", "a path of this machine"),
        ("node GPU-17 failed", "the name of this machine"),
        ("gpu-17.example.org:30000", "the name of this machine"),
        ("http://127.0.0.1:30000", "a URL"),
        ("file:///data", "a URL"),
        ("/scratch/team/train.jsonl", "an absolute path"),
        ("cannot read '/scratch/team/x'", "an absolute path"),
        ("/tmp", "an absolute path"),
        ("~/train.jsonl", "an absolute path"),
        ("C:\\Users\\me", "an absolute path"),
    ],
)
def test_what_is_found(value: str, what: str) -> None:
    assert list(find_leaks({"recipe": {"a": [{"b": value}]}}, PRIVATE)) == [f"recipe.a.0.b: {what}"]
    assert list(find_leaks({"recipe": {value: 1}}, PRIVATE)) == [f"a key in recipe: {what}"]


@pytest.mark.parametrize("name", ["api_key", "apikey", "hub_token", "client-secret", "password", "Authorization"])
def test_a_setting_that_holds_a_secret_by_its_name(name: str) -> None:
    assert list(find_leaks({"engine": {"extra": {name: "any"}}}, PRIVATE)) == [
        f"engine.extra.{name}: a setting that holds a secret"
    ]
    assert list(find_leaks({name: 3, "x": {name: None}}, PRIVATE)) == []


@pytest.mark.parametrize(
    "value",
    [
        "org/model",
        "train.jsonl",
        "data/train.jsonl",
        "hf://datasets/a/b",
        "s3://bucket/some/path",
        "and/or",
        "1/2/3",
        "</think>",
        "a gpu-170 and mygpu-17",
        "/no_think",
        "/srv/people/menu is one component more",
        "pkg.mod:function",
        "2.13.0+cu128",
    ],
)
def test_what_may_be_shared(value: str) -> None:
    found = list(find_leaks({"recipe": {"x": value}}, PRIVATE))
    assert found == (["recipe.x: an absolute path"] if value.startswith("/srv") else [])


def test_words_for_a_model_may_hold_slashes_and_addresses() -> None:
    texts = {"template": "{question} See https://example.org or /a/b/c.", "system": "/x/y", "stop": ["//a/b"]}
    assert list(find_leaks({"recipe": texts}, PRIVATE)) == []
    assert list(find_leaks({"recipe": {"system": "I am on gpu-17"}}, PRIVATE)) == [
        "recipe.system: the name of this machine"
    ]
    assert find_secret("https://arxiv.org/abs/2604.14258 of /x/y", PRIVATE) is None
    assert find_secret("correct-horse", PRIVATE) == "the value of MY_API_KEY"


def test_what_is_private_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-3.cluster.example")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    environment = {
        "HF_TOKEN": "hf_of_this_test",
        "A_KEY": "0123456789",
        "SHORT_KEY": "1",
        "MY_SECRET": "a-long-secret",
        "KEYBOARD": "not-a-secret",
        "TOKENIZERS_PARALLELISM": "not-a-secret",
        "HTTPS_PROXY": "http://me:proxy-password@host:1",
    }
    found = private_here(environment)
    assert set(found.secrets) - {"the Hub token"} == {"HF_TOKEN", "A_KEY", "MY_SECRET", "HTTPS_PROXY (its password)"}
    assert found.secrets["HTTPS_PROXY (its password)"] == "proxy-password"
    assert set(found.folders) == {str(tmp_path), str(tmp_path / "me")}
    assert found.hosts == ("node-3", "node-3.cluster.example")
    monkeypatch.setattr(socket, "gethostname", lambda: "train")
    assert private_here({}).hosts == ()


def test_the_recipe_of_a_config_full_of_places_is_shareable(tmp_path: Path, demo: Path) -> None:
    """Whatever path a config names, its recipe tells only its last part."""
    (tmp_path / "model").mkdir()
    settings: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "out": str(tmp_path / "out"),
        "prompts": {"path": str(demo / "train.jsonl"), "columns": {"expert": "expert"}},
        "decontaminate": [{"path": str(tmp_path / "gone" / "test.jsonl")}],
        "responses": {
            "teachers": [
                {
                    "name": "t",
                    "model": "/mnt/models/big",
                    "engine": {"name": "server", "urls": ["http://node1:30000"], "serves": "/mnt/models/big"},
                },
                {"name": "u", "model": "m", "engine": {"name": "openai", "base_url": "https://x/v1"}},
            ]
        },
        "engine": {"name": "sglang", "python": "/opt/env/bin/python", "options": {"tokenizer_path": "/mnt/tok"}},
        "extend": "/scratch/earlier",
    }
    recipe = shareable(validate_config(GenerateConfig, settings, "test").recipe())
    private = Private({}, (str(tmp_path), str(demo)), ())
    assert list(find_leaks(recipe, private)) == []
    assert "/" not in json.dumps(recipe).replace(f"{tmp_path.name}/model", "")


def test_a_model_folder_that_is_gone_is_shown_by_its_last_part(tmp_path: Path) -> None:
    assert shown_name(str(tmp_path / "gone")) == "gone"
