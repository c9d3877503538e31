"""Each finding in a data set where its defect is planted, and none in clean data."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aid.data_sets import END, GENERATION_PROMPT, TURN, Made, group, save

from gftdata import content
from gftdata.audit import Finding
from gftdata.errors import UserError
from gftdata.inspection import Inspection, inspect_data
from gftdata.manifest import MANIFEST, ModelRecord, TokenizerRecord, read_manifest
from gftdata.tokens import NO_TEMPLATE_HASH, encode_prompt, load_tokenizer
from gftdata.types import Group, Message

CLEAN = (Made("expert", finish="given"), Made(text="one"), Made(text="two", reward=0.0), Made(text="three"))


def clean(count: int = 12) -> list[Group]:
    return [group(number, CLEAN) for number in range(count)]


def planted(folder: Path, groups: Sequence[Group], **changes: Any) -> dict[str, Finding]:
    """What is found in these groups, by kind and source, of which no two findings are the same."""
    found = inspect_data(str(save(folder, [groups[:5], groups[5:]], **changes))).findings
    by_name = {f"{finding.kind}:{finding.source}" if finding.source else finding.kind: finding for finding in found}
    assert len(by_name) == len(found)
    return by_name


def with_responses(number: int, *made: Made) -> list[Group]:
    """Clean groups, but for one."""
    groups = clean()
    groups[number] = group(number, made)
    return groups


def test_nothing_is_found_in_clean_data(tmp_path: Path) -> None:
    assert planted(tmp_path, clean()) == {}


@pytest.mark.parametrize("made", [[], [[]]])
def test_nothing_is_found_in_nothing(tmp_path: Path, made: list[Any]) -> None:
    found = inspect_data(str(save(tmp_path, made)))
    assert found.findings == () and found.counts.summary.groups == 0


BAD: dict[str, Made] = {
    "truncated:self": Made(text="cut", finish="length", ids=(11, 12)),
    "missing_eos:self": Made(text="open", ids=(11, 12)),
    "missing_eos:expert": Made("expert", text="open", finish="given", ids=(11, 12)),
    "further_turns:self": Made(text="more", ids=(11, END, 12, END)),
    "empty:self": Made(text="", ids=(END,)),
    "template_markers:teacher:a": Made("teacher:a", text="x<|im_end|>\n<|im_start|>user", finish="given"),
    "unjudged:self": Made(text="slow", reward=None),
    "expert_fails:expert": Made("expert", reward=0.0, text="wrong", finish="given"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_defect_of_a_response_is_found_and_is_a_problem(tmp_path: Path, kind: str) -> None:
    found = planted(tmp_path, with_responses(7, *CLEAN, BAD[kind]))
    assert list(found) == [kind]
    finding = found[kind]
    assert finding.severity == "problem" and finding.count == 1
    assert finding.examples == (group(7, []).prompt.prompt_id,)
    assert finding.of == {"self": 37, "expert": 13, "teacher:a": 1}[finding.source or ""]
    assert finding.advice


def test_a_response_with_tokens_and_no_text_is_empty(tmp_path: Path) -> None:
    found = planted(tmp_path, with_responses(0, *CLEAN, Made(text=" \n", ids=(11, 12, END))))
    assert list(found) == ["empty:self"] and found["empty:self"].count == 1
    assert "no text" in found["empty:self"].what


def test_several_are_counted_and_a_few_named(tmp_path: Path) -> None:
    cut = replace(CLEAN[1], finish="length", ids=(11,))
    found = planted(tmp_path, [group(number, [*CLEAN, cut, replace(cut, text="x")]) for number in range(9)])
    assert found["truncated:self"].count == 18
    assert found["truncated:self"].examples == tuple(group(n, []).prompt.prompt_id for n in range(3))


def test_a_response_may_end_with_any_of_the_recorded_end_tokens(tmp_path: Path) -> None:
    tokenizer = TokenizerRecord(hash="h", template_hash="t", end_id=END, stop_ids=(END, 5))
    groups = with_responses(3, *CLEAN, Made(text="other end", ids=(11, 5)))
    assert planted(tmp_path, groups, tokenizer=tokenizer) == {}


def test_where_texts_end_responses_a_missing_end_is_no_problem(tmp_path: Path) -> None:
    recipe = {"responses": {"self": {"sampling": {"stop": ["."]}}}}
    groups = with_responses(3, *CLEAN, Made(text="stopped.", ids=(11, 12)))
    found = planted(tmp_path, groups, recipe=recipe)
    assert found["missing_eos:self"].severity == "note" and "sampling.stop" in found["missing_eos:self"].what


def test_rewards_of_a_source_that_never_differ(tmp_path: Path) -> None:
    same = [Made("teacher:a", reward=0.5), Made("teacher:a", reward=0.5, text="b"), Made(reward=0.0), *CLEAN[:1]]
    found = planted(tmp_path, [group(number, same) for number in range(9)])
    assert list(found) == ["no_reward_variance:self", "no_reward_variance:teacher:a", "weak_self:self"]
    assert [finding.severity for finding in found.values()] == ["problem", "note", "note"]
    assert "the reward 0.5" in found["no_reward_variance:teacher:a"].what
    assert (found["no_reward_variance:teacher:a"].count, found["no_reward_variance:teacher:a"].of) == (18, 18)
    assert "can diverge" in found["weak_self:self"].advice and found["weak_self:self"].of == 9


def test_one_other_reward_is_variance(tmp_path: Path) -> None:
    groups = with_responses(0, *CLEAN, Made("teacher:a"), Made("teacher:a", reward=0.0, text="b"))
    assert planted(tmp_path, groups) == {}


def test_groups_without_signal_are_a_note_and_nothing_else_is_a_problem(tmp_path: Path) -> None:
    found = planted(tmp_path / "some", with_responses(4, CLEAN[0], CLEAN[1]))
    assert list(found) == ["no_signal"]
    assert (found["no_signal"].severity, found["no_signal"].count, found["no_signal"].of) == ("note", 1, 12)
    assert found["no_signal"].examples == (group(4, []).prompt.prompt_id,)
    found = planted(tmp_path / "all", [group(number, CLEAN[:2]) for number in range(4)])
    assert found["no_signal"].severity == "problem"


def test_groups_of_one_response_need_no_signal(tmp_path: Path) -> None:
    assert planted(tmp_path, [group(number, CLEAN[:1]) for number in range(4)]) == {}


def test_groups_that_nobody_judged(tmp_path: Path) -> None:
    nobody = Made(reward=None, status="no_ground_truth")
    found = planted(tmp_path, with_responses(6, nobody))
    assert list(found) == ["unjudged:self", "groups_unjudged"]
    assert "1 no_ground_truth" in found["unjudged:self"].what
    assert found["groups_unjudged"].examples == (group(6, []).prompt.prompt_id,)


def test_prompts_and_responses_that_come_again(tmp_path: Path) -> None:
    groups = clean()
    groups[9] = group(9, [*CLEAN, CLEAN[1]], "question 2")
    found = planted(tmp_path / "some", groups)
    assert list(found) == ["repeated_prompts", "identical:self"]
    assert (found["repeated_prompts"].count, found["repeated_prompts"].examples) == (1, (groups[9].prompt.prompt_id,))
    assert found["identical:self"].severity == "note" and found["identical:self"].count == 1
    mostly = [group(number, [CLEAN[0], Made(reward=0.0), Made(), Made()]) for number in range(8)]
    found = planted(tmp_path / "mostly", mostly)
    assert found["identical:self"].severity == "problem" and "8 groups" in found["identical:self"].what


def test_prompts_of_the_same_messages_with_another_truth_are_others(tmp_path: Path) -> None:
    assert planted(tmp_path, [*clean(), group(99, CLEAN, "question 2", ground_truth="2")]) == {}


def test_a_prompt_that_ends_otherwise_is_found(tmp_path: Path) -> None:
    groups = clean()
    groups[5] = group(5, CLEAN, prompt_ids=(20, END, TURN, 8))
    groups[8] = group(8, CLEAN, prompt_ids=(20, TURN, 9))
    found = planted(tmp_path, groups)
    assert list(found) == ["template_mismatch"]
    finding = found["template_mismatch"]
    assert (finding.count, finding.of, finding.severity) == (2, 12, "problem")
    assert finding.examples == (groups[5].prompt.prompt_id, groups[8].prompt.prompt_id)
    assert " ".join(map(str, GENERATION_PROMPT)) in finding.what


@pytest.mark.parametrize("template", ["t", NO_TEMPLATE_HASH])
def test_where_prompts_show_no_end_of_a_turn_their_ends_are_not_compared(tmp_path: Path, template: str) -> None:
    tokenizer = TokenizerRecord(hash="h", template_hash=template, end_id=END, stop_ids=(END,))
    groups = [group(number, CLEAN, prompt_ids=(20, number)) for number in range(12)]
    found = inspect_data(str(save(tmp_path, [groups], tokenizer=tokenizer)))
    assert found.findings == () and found.content.generation_prompt is None


def encoded(
    folder: Path, model: Path, change: Callable[[list[int]], list[int]] = lambda ids: ids, name: str = ""
) -> Path:
    """Groups whose prompts are what the model's template gives; one of them changed."""
    tokenizer = load_tokenizer(str(model))
    groups = []
    for number in range(8):
        ids = encode_prompt(tokenizer, [Message("user", f"question {number}")]).tolist()
        ends = tuple(replace(made, ids=(40, tokenizer.end_id)) for made in CLEAN)
        groups.append(group(number, ends, prompt_ids=change(ids) if number == 5 else ids))
    record = TokenizerRecord(
        hash=tokenizer.hash,
        template_hash=tokenizer.template_hash,
        end_id=tokenizer.end_id,
        stop_ids=tokenizer.stop_ids,
    )
    models = (ModelRecord(role="reference", name=name or str(model), revision="1"),)
    return save(folder, [groups], tokenizer=record, models=models)


def test_prompts_are_encoded_again_where_the_tokenizer_is_here(tmp_path: Path, chat_model: Path) -> None:
    sound = inspect_data(str(encoded(tmp_path / "sound", chat_model)))
    assert sound.findings == ()
    assert (sound.content.encoded, sound.content.encoded_by) == (8, str(chat_model))
    assert sound.content.generation_prompt is not None
    spoiled = encoded(tmp_path / "spoiled", chat_model, lambda ids: [*ids[:4], 41, *ids[5:]], "nobody/has-this")
    unchecked = inspect_data(str(spoiled))
    assert unchecked.findings == () and unchecked.content.encoded == 0
    assert "nobody/has-this is not on this machine" in unchecked.content.encoded_by
    (finding,) = inspect_data(str(spoiled), model=str(chat_model)).findings
    assert (finding.kind, finding.count, finding.of) == ("template_mismatch", 1, 8)
    assert finding.examples == (group(5, []).prompt.prompt_id,)


def test_another_tokenizer_is_refused_or_not_used(tmp_path: Path, chat_model: Path, demo: Path, one_line: Any) -> None:
    folder = encoded(tmp_path / "data", chat_model, name=str(demo / "model"))
    with pytest.raises(UserError, match=r"its tokenizer is not the one that made the ids .*--model") as refused:
        inspect_data(str(folder), model=str(demo / "model"))
    one_line(refused.value)
    found = inspect_data(str(folder))
    assert found.content.encoded == 0 and "has another tokenizer" in found.content.encoded_by


def test_a_manifest_that_says_something_else_than_the_shards(tmp_path: Path) -> None:
    folder = save(tmp_path, [clean(5), [group(number, CLEAN) for number in range(5, 12)]])
    manifest = read_manifest(folder)
    own = manifest.summary.sources[1]
    lies = {
        "groups": manifest.summary.model_copy(update={"groups": 11}),
        "pass_rate of self": manifest.summary.model_copy(
            update={"sources": (manifest.summary.sources[0], own.model_copy(update={"pass_rate": 0.9}))}
        ),
        "sources: expert, found expert, self": manifest.summary.model_copy(
            update={"sources": manifest.summary.sources[:1]}
        ),
    }
    for said, summary in lies.items():
        rewrite(folder, manifest.model_copy(update={"summary": summary}))
        (finding,) = inspect_data(str(folder)).findings
        assert (finding.kind, finding.severity, finding.count) == ("summary_differs", "problem", 1)
        assert f"({said}" in finding.what
    record = manifest.shards[1].model_copy(update={"rows": 6})
    rewrite(folder, manifest.model_copy(update={"shards": (manifest.shards[0], record)}))
    (finding,) = inspect_data(str(folder)).findings
    assert finding.kind == "row_counts" and "7 groups, the manifest says 6" in finding.what


def rewrite(folder: Path, manifest: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json")))


def test_the_number_of_identical_texts_of_large_data_is_only_compared_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "SAMPLE_GROUPS", 11)
    folder = save(tmp_path, [clean()])
    manifest = read_manifest(folder)
    own = manifest.summary.sources[1].model_copy(update={"identical": 4})
    changed = manifest.summary.model_copy(update={"sources": (manifest.summary.sources[0], own)})
    rewrite(folder, manifest.model_copy(update={"summary": changed}))
    assert [finding.kind for finding in inspect_data(str(folder)).findings] == ["identical"]
    (finding,) = inspect_data(str(folder), deep=True).findings
    assert finding.kind == "summary_differs" and "(identical of self: 4, found 0" in finding.what


def test_of_a_large_data_set_some_row_groups_are_looked_at_and_deep_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "SAMPLE_GROUPS", 20)
    monkeypatch.setattr(content, "SAMPLE_ROW_GROUPS", 4)
    shards = [clean(9) for _ in range(6)]
    shards[1][8] = group(8, [*CLEAN, BAD["missing_eos:self"]])
    folder = str(save(tmp_path, shards))
    sampled, deep = inspect_data(folder), inspect_data(folder, deep=True)
    assert sampled.content.groups == 12  # the first row group of 4 shards
    assert deep.content.groups == 54
    kinds: list[set[str]] = [{finding.kind for finding in found.findings} for found in (sampled, deep)]
    assert kinds == [{"repeated_prompts"}, {"repeated_prompts", "missing_eos"}]
    one = str(save(tmp_path / "one", [[group(number, CLEAN) for number in range(30)]]))
    assert inspect_data(one).content.groups == 12  # 4 of its 10 row groups


def test_a_row_group_that_unpacks_to_too_much_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, [clean()])
    monkeypatch.setattr("gftdata.shards.MAX_ROW_GROUP_BYTES", 10)
    found = inspect_data(str(folder))
    assert found.content.groups == 0 and len(found.content.left_out) == 4
    assert "row group 0 unpacks to" in found.content.left_out[0]


def test_generated_data_has_no_problems(data: Path, demo: Path, tmp_path: Path) -> None:
    found = inspect_data(str(data), model=str(demo / "model"))
    assert not found.has_problems, found.findings
    assert (found.content.groups, found.content.encoded) == (24, 24)
    whole: Inspection = inspect_data(str(data), deep=True, model=str(demo / "model"))
    assert whole.content == found.content and whole.findings == found.findings
    copied = shutil.copytree(data, tmp_path / "copy")
    assert inspect_data(str(copied), model=str(demo / "model")).findings == found.findings
