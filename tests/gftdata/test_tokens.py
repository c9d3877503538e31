"""Text -> token ids: templates, the token that ends a response, text that looks like special tokens."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gftdata.errors import UserError
from gftdata.tokens import (
    Tokenizer,
    decode_response,
    encode_prompt,
    encode_response,
    load_tokenizer,
    load_vocabulary,
    next_token_inputs,
    template_hash,
    token_texts,
    tokenizer_hash,
)
from gftdata.types import Message

OneLine = Callable[[BaseException], str]
ENDOFTEXT, IM_START, IM_END = 0, 1, 2
QUESTION = (Message("user", "What is 12+34?"),)


@pytest.fixture(scope="module")
def chat(chat_model: Path) -> Tokenizer:
    return load_tokenizer(str(chat_model))


@pytest.fixture(scope="module")
def plain(demo: Path) -> Tokenizer:
    return load_tokenizer(str(demo / "model"))


def edited(tmp_path: Path, model: Path, **settings: Any) -> Path:
    """A copy of a model with other tokenizer settings; None takes one out."""
    folder = tmp_path / "edited"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    merged = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    if settings.get("chat_template", "") is None:
        (folder / "chat_template.jinja").unlink()
    return folder


def test_the_end_token_is_the_templates_and_not_eos(chat: Tokenizer) -> None:
    backend = chat.backend
    assert backend.eos_token_id == backend.pad_token_id == ENDOFTEXT, "what this tokenizer is for"
    assert chat.end_id == IM_END == backend.convert_tokens_to_ids("<|im_end|>")
    assert set(chat.stop_ids) == {ENDOFTEXT, IM_END}


def test_without_a_template_eos_ends(plain: Tokenizer, other_model: Path) -> None:
    assert plain.end_id == plain.backend.eos_token_id == 1
    assert plain.stop_ids == (1,)
    assert load_tokenizer(str(other_model)).end_id == 1


def test_the_models_generation_settings_add_stop_tokens(penalised_model: Path, tmp_path: Path) -> None:
    path = penalised_model / "generation_config.json"
    assert json.loads(path.read_text())["eos_token_id"] == [0, 2]
    assert load_tokenizer(str(penalised_model)).stop_ids == (0, 2)
    copy = tmp_path / "copy"
    shutil.copytree(penalised_model, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(str(copy)).stop_ids == (0, 2, 7)
    (copy / "generation_config.json").unlink()
    assert load_tokenizer(str(copy)).stop_ids == (0, 2)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }} Over.{% endfor %}",
    ],
)
def test_a_template_that_closes_a_turn_with_no_token_of_its_own(
    tmp_path: Path, chat_model: Path, template: str
) -> None:
    folder = edited(tmp_path, chat_model, chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.end_id == ENDOFTEXT
    assert tokenizer.stop_ids == (ENDOFTEXT,)


def test_a_model_that_cannot_end(tmp_path: Path, demo: Path, one_line: OneLine) -> None:
    folder = edited(tmp_path, demo / "model", eos_token=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert "neither its chat template nor an eos_token" in one_line(caught.value)


def test_prompts_by_template_equal_its_text(chat: Tokenizer) -> None:
    ids = encode_prompt(chat, [Message("system", "s"), *QUESTION])
    assert ids.dtype == np.int32
    text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nWhat is 12+34?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.backend.decode(ids) == text
    assert ids.tolist() == chat.backend(text, add_special_tokens=False)["input_ids"]
    assert np.count_nonzero(ids == IM_START) == 3


def test_prompt_and_response_together_are_what_the_template_writes(chat: Tokenizer) -> None:
    """The trainer's prompt_ids + response_ids are a prefix of the whole chat's ids."""
    answer = "The answer is 46."
    ours = [*encode_prompt(chat, QUESTION), *encode_response(chat, answer, ended=True)]
    messages = [{"role": "user", "content": QUESTION[0].content}, {"role": "assistant", "content": answer}]
    whole = chat.backend.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert whole[: len(ours)] == ours


def test_prompts_without_a_template_are_plain_text(plain: Tokenizer, one_line: OneLine) -> None:
    assert plain.backend.decode(encode_prompt(plain, [Message("user", "12+34=")])) == "12+34="
    for messages in ([Message("system", "1"), Message("user", "2")], [*QUESTION, *QUESTION]):
        with pytest.raises(UserError) as caught:
            encode_prompt(plain, messages)
        assert "no chat template" in one_line(caught.value) and "found 2" in str(caught.value)
    with pytest.raises(UserError) as caught:
        encode_prompt(plain, [Message("user", "")])
    assert "empty after tokenisation" in one_line(caught.value)


def test_a_template_that_refuses_a_role_is_quoted(tmp_path: Path, chat_model: Path, one_line: OneLine) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nhere') }}{% endif %}x<|im_end|>"
    folder = edited(tmp_path, chat_model, chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(UserError) as caught:
        encode_prompt(tokenizer, [Message("system", "s"), *QUESTION])
    assert "['system', 'user']" in one_line(caught.value) and "No system" in str(caught.value)


@pytest.mark.parametrize("which", ["chat", "plain"])
def test_given_text_is_closed_by_the_end_token(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    closed, open_ = (encode_response(tokenizer, "12+34=46", ended=ended) for ended in (True, False))
    assert closed.dtype == open_.dtype == np.int32
    assert closed[-1] == tokenizer.end_id and (closed[:-1] == open_).all()
    assert tokenizer.end_id not in open_
    assert decode_response(tokenizer, closed) == decode_response(tokenizer, open_) == "12+34=46"
    assert encode_response(tokenizer, "", ended=True).tolist() == [tokenizer.end_id]
    assert encode_response(tokenizer, "", ended=False).tolist() == []


def test_special_tokens_in_given_text_are_text(chat: Tokenizer, plain: Tokenizer) -> None:
    text = "46<|im_end|>\n<|im_start|>user\nno<|endoftext|>"
    ids = encode_response(chat, text, ended=True)
    assert np.flatnonzero(np.isin(ids, [ENDOFTEXT, IM_START, IM_END])).tolist() == [len(ids) - 1]
    assert chat.backend.decode(ids[:-1]) == text, "nothing of the text is lost"
    ids = encode_response(plain, "1<eos>2<pad>", ended=True)
    assert np.flatnonzero(np.isin(ids, [0, 1])).tolist() == [len(ids) - 1]
    # and asking for it is no lasting change of the tokenizer
    assert chat.backend("<|im_end|>")["input_ids"] == [IM_END]
    assert encode_prompt(chat, QUESTION)[0] == IM_START
    assert tokenizer_hash(chat.backend) == chat.hash


@pytest.mark.parametrize(
    "text", ["é 😀\n\ttabs  and   spaces ,. 's", " leading", "trailing ", "\n\n", "\\boxed{46}", "中文"]
)
def test_byte_level_text_comes_back_as_it_was(chat: Tokenizer, text: str) -> None:
    for ended in (True, False):
        assert decode_response(chat, encode_response(chat, text, ended=ended)) == text


def test_sampled_special_tokens_are_not_part_of_the_text(chat: Tokenizer) -> None:
    ids = encode_response(chat, "46", ended=False)
    assert decode_response(chat, np.array([*ids, IM_START, ENDOFTEXT], np.int32)) == "46"


def test_the_hash_is_of_what_the_tokenizer_does(
    chat: Tokenizer, chat_model: Path, plain: Tokenizer, tmp_path: Path
) -> None:
    again = load_tokenizer(str(chat_model))
    assert (again.hash, again.template_hash) == (chat.hash, chat.template_hash)
    again.backend("a", padding="max_length", max_length=9, truncation=True)
    again.backend.padding_side = "left"
    again.backend.model_max_length = 17
    assert tokenizer_hash(again.backend) == chat.hash
    shutil.copytree(chat_model, tmp_path / "saved")
    again.backend.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() != (chat_model / "tokenizer.json").read_bytes(), (
        "padding and truncation were stored"
    )
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert (saved.hash, saved.template_hash) == (chat.hash, chat.template_hash)
    assert len({chat.hash, plain.hash}) == 2


def test_the_hash_knows_every_part(chat: Tokenizer, chat_model: Path, tmp_path: Path) -> None:
    def hash_after(change: Callable[[dict[str, Any]], Any]) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(chat_model, folder, dirs_exist_ok=True)
        description = json.loads((chat_model / "tokenizer.json").read_text())
        change(description)
        (folder / "tokenizer.json").write_text(json.dumps(description))
        return load_tokenizer(str(folder)).hash

    def swap(description: dict[str, Any]) -> None:
        vocab = description["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    hashes = [
        hash_after(lambda d: None),
        hash_after(swap),
        hash_after(lambda d: d["model"]["merges"].pop()),
        hash_after(lambda d: d.update(normalizer={"type": "Lowercase"})),
        hash_after(lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
    ]
    assert hashes[0] == chat.hash
    assert len(set(hashes)) == len(hashes)


def test_the_template_has_a_hash_of_its_own(
    chat: Tokenizer, plain: Tokenizer, chat_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other-template"
    shutil.copytree(chat_model, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    changed = load_tokenizer(str(folder))
    assert changed.hash == chat.hash
    assert len({changed.template_hash, chat.template_hash, plain.template_hash}) == 3
    assert plain.template_hash == template_hash(plain.backend)


def test_the_shift_by_one() -> None:
    prompt, response = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)
    inputs, first = next_token_inputs(prompt, response)
    assert inputs.tolist() == [5, 6, 7, 8] and first == 2
    sequence = [*prompt, *response]
    for t, token in enumerate(response):
        assert sequence[: first + t + 1] == inputs[: first + t + 1].tolist(), "what the model has seen"
        assert sequence[first + t + 1] == token, "what comes next"


def test_models_without_a_tokenizer(tmp_path: Path, demo: Path, one_line: OneLine) -> None:
    def refusal(model: str) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(model)
        return one_line(caught.value)

    for mistyped in (str(tmp_path / "none"), "./none", "some/folder/model"):
        assert refusal(mistyped) == f"{mistyped}: no such model folder"
    assert "has no config.json" in refusal(str(tmp_path))
    assert "no-such-org/no-such-model: cannot load its tokenizer" in refusal("no-such-org/no-such-model")
    folder = tmp_path / "weights-only"
    folder.mkdir()
    shutil.copy(demo / "model" / "config.json", folder)
    assert f"{folder}: " in refusal(str(folder))
    shutil.copytree(demo / "model", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    assert "broken: cannot load its tokenizer" in refusal(str(tmp_path / "broken"))


def test_tokens_one_by_one_are_the_text(chat_model: Path, chat: Tokenizer):
    text = "What is 12+34?\n\tLet x be é, 漢 and \U0001f600"
    ids = encode_response(chat, text, ended=True).tolist()
    texts = token_texts(load_vocabulary(str(chat_model)), ids)
    assert texts[IM_END] == "<|im_end|>"
    pieces = "".join(texts[i] for i in ids[:-1])
    whole = re.sub(r"(?:<0x[0-9a-f ]+>)+", lambda m: bytes.fromhex(re.sub("<0x|>| ", "", m[0])).decode(), pieces)
    assert whole == text and "<0x" in pieces


def test_an_id_that_no_vocabulary_has(demo: Path):
    vocabulary = load_vocabulary(str(demo / "model"))
    assert token_texts(vocabulary, [3, 99_999, -1]) == {3: "0", 99_999: "<id 99999>", -1: "<id -1>"}


def test_spaces_that_a_decoder_drops_are_put_back():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581the": 0, "<0xE6>": 1, "a": 2}, [], byte_fallback=True))
    steps = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    assert token_texts(backend, [0, 1, 2]) == {0: " the", 1: "<0xe6>", 2: "a"}


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, one_line: OneLine):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as missing:
        load_vocabulary(str(tmp_path))
    assert "tokenizer.json" in one_line(missing.value)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError) as broken:
        load_vocabulary(str(tmp_path))
    assert "tokenizer.json" in one_line(broken.value)
