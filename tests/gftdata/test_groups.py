"""What becomes of texts on their way into a group."""

from pathlib import Path

import pytest

from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.groups import given_completions, text_completion, without_thinking
from gftdata.prepare import phases
from gftdata.tokens import load_tokenizer
from gftdata.types import GivenText, Message, Prompt


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("12+34=46", "12+34=46"),
        ("<think>hm, 46?</think>\n\n12+34=46", "12+34=46"),
        ("hm, 46?</think>46", "46"),  # the template opened it in the prompt
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>never ends", ""),
        ("<think>all of it</think>", ""),
        ("<think>all of it</think>\n ", ""),
        ("", ""),
        ("a < b > c </thinking>", "a < b > c </thinking>"),
    ],
)
def test_thinking_is_removed(text: str, left: str) -> None:
    assert without_thinking(text, cut=False) == left
    assert without_thinking(text, cut=True) == (left if "</think>" in text else "")


def config_with(**responses: object) -> GenerateConfig:
    prompts = {"path": "p.jsonl", "columns": {"expert": "e"}}
    return validate_config(GenerateConfig, {"model": "m", "out": "o", "prompts": prompts, "responses": responses}, "t")


def test_only_the_sources_that_say_so_lose_their_thinking_and_nothing_is_left_of_some(demo: Path) -> None:
    tokenizer = load_tokenizer(str(demo / "model"))
    responses = config_with(
        max_tokens=12,
        teachers=[{"name": "a", "column": "a", "remove_thinking": True}, {"name": "b", "column": "b"}],
    ).responses
    texts = ("<think>1</think>46", "<think>1", "46", "1" * 12, "1" * 11)
    given = tuple(GivenText(source, text) for source in ("teacher:a", "teacher:b") for text in texts)
    prompt = Prompt("p", None, (Message("user", "q"),), None, "s", given, "{}", "q")
    kept = [(c.source, c.text) for c in given_completions(responses, prompt, tokenizer)]
    # each character is a token here, and the end is one more
    assert kept == [("teacher:a", "46"), ("teacher:a", "46"), ("teacher:a", "1" * 11)] + [
        ("teacher:b", text) for text in ("<think>1", "46", "1" * 11)
    ]


def test_a_text_that_was_cut_gets_no_end(demo: Path) -> None:
    tokenizer = load_tokenizer(str(demo / "model"))
    responses = config_with(teachers=[]).responses
    cut = text_completion(responses, "teacher:x", "46", "length", "m", None, tokenizer)
    whole = text_completion(responses, "teacher:x", "46", "stop", "m", None, tokenizer)
    assert cut is not None and whole is not None
    assert [*cut.response_ids.tolist(), tokenizer.end_id] == whole.response_ids.tolist()
    assert text_completion(responses, "teacher:x", "", "stop", "m", None, tokenizer) is None


def test_each_teacher_is_asked_in_its_own_way() -> None:
    teachers = [
        {"name": "plain", "model": "m1"},
        {"name": "long", "model": "m2", "template": "Think. {question} {braces}", "system": "Be wise."},
        {"name": "bare", "model": "m3", "template": "{question}"},
    ]
    plain, long, bare, own = phases(config_with(teachers=teachers))
    messages = (Message("system", "old"), Message("user", "x"), Message("assistant", "y"), Message("user", "Q: {q}?!"))
    prompt = Prompt("p", None, messages, None, "s", (), "{}", "{q}?")
    assert plain.messages(prompt) == own.messages(prompt) == messages
    assert long.messages(prompt) == (
        Message("system", "Be wise."),
        *messages[1:3],
        Message("user", "Think. {q}? {braces}"),
    )
    assert bare.messages(prompt) == (*messages[:3], Message("user", "{q}?"))
    for wrong, said in [
        ({"name": "t", "column": "c", "template": "{question}"}, "apply to a model that is sampled"),
        ({"name": "t", "model": "m", "template": "no place"}, "must contain {question}"),
        ({"name": "t", "model": "m", "column": "c"}, "exactly one of column, reused and model"),
    ]:
        with pytest.raises(UserError, match=said):
            config_with(teachers=[wrong])
