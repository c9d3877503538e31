"""What the tables and notes of the terminal say of a data set."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from gftcli import show
from gftdata.config import GenerateConfig
from gftdata.manifest import Manifest, PromptCounts, SourceSummary, Summary, TokenizerRecord
from gftdata.prepare import Preview
from gftdata.tasks import Task

COUNTS = {
    "rows_read": 1200,
    "prompts": 1000,
    "prompts_too_long": 0,
    "duplicates": 0,
    "near_duplicates": 0,
    "duplicates_removed": 0,
    "contaminated": 0,
    "given_missing": 0,
    "given_left_out": 0,
}


def printed(draw: Any, *arguments: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    draw(console, *arguments)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def source(name: str, **changes: Any) -> SourceSummary:
    made = SourceSummary(
        source=name,
        responses=4000,
        judged=4000,
        mean_reward=0.5,
        pass_rate=1.0,
        finish_reasons={"stop": 4000},
        mean_tokens=512.25,
        median_tokens=400,
        p95_tokens=1700,
        max_tokens=2048,
        truncated=0,
        identical=0,
        groups_all_identical=0,
        mean_ref_logprob=-0.25,
    )
    return made.model_copy(update=changes)


def manifest(*sources: SourceSummary, **counts: Any) -> Manifest:
    return Manifest(
        format="gft-groups",
        schema_version=1,
        toolkit_version="0",
        recipe={},
        models=(),
        tokenizer=TokenizerRecord(hash="", template_hash="", end_id=0, stop_ids=()),
        engine="none",
        packages={},
        prompts=PromptCounts(**COUNTS | counts),
        prompts_quarantined=0,
        teacher_samples_left_out=0,
        summary=Summary(
            groups=1000,
            responses=4000,
            response_tokens=1,
            groups_without_signal=0,
            groups_unjudged=0,
            sources=sources,
        ),
        shards=(),
    )


def test_the_table_of_sources_fits_a_terminal_of_120_columns() -> None:
    large = source(
        "teacher:qwen3-32b-it",
        responses=8_000_000,
        judged=1,
        mean_tokens=32123.4,
        median_tokens=30_000,
        p95_tokens=32_768,
        truncated=1_234_567,
        identical=7_654_321,
        mean_ref_logprob=-12.345,
    )
    lines = printed(show.sources, (large, source("self"))).splitlines()
    assert len(lines) == 3 and max(len(line.rstrip()) for line in lines) <= 120
    assert lines[0].split("  ")[0] == "source" and "…" not in "".join(lines)
    cells = lines[1].split()
    assert cells == [
        *("teacher:qwen3-32b-it", "8,000,000", "1.000", "0.500", "7,999,999", "32123.4", "30,000", "32,768"),
        *("1,234,567", "7,654,321", "-12.345"),
    ]


@pytest.mark.parametrize(
    ("found", "noted"),
    [
        (source("self", groups_all_identical=501), True),
        (source("self", groups_all_identical=500), False),
        (source("teacher:a", groups_all_identical=1000, finish_reasons={"length": 1, "stop": 3999}), True),
        (source("teacher:a", groups_all_identical=1000, finish_reasons={"given": 4000}), False),
        (source("expert", groups_all_identical=1000, finish_reasons={"given": 4000}), False),
        (source("expert", groups_all_identical=1000, finish_reasons={"stop": 4000}), False),
    ],
)
def test_samples_that_are_all_the_same_are_pointed_out(found: SourceSummary, noted: bool) -> None:
    text = printed(show.manifest, "out", manifest(found))
    notes = [line for line in text.splitlines() if line.startswith("note:")]
    assert len(notes) == noted
    if noted:
        assert f"{found.groups_all_identical:,} of 1,000 groups" in notes[0] and found.source in notes[0]
        assert "seeds or temperature" in notes[0]


def test_prompts_left_out_are_named() -> None:
    counts = {"duplicates": 1100, "near_duplicates": 22, "duplicates_removed": 33, "contaminated": 44}
    text = printed(show.manifest, "out", manifest(**counts))
    assert "1,100 rows came before word for word, 22 almost; 33 left out" in text
    assert "33 duplicates, 44 prompts that share 8 words in a row with an evaluation set" in text
    text = printed(show.manifest, "out", manifest(near_duplicates=None))
    assert "almost: not looked for" in text and "left out         nothing" in text
    assert "evaluation set" not in text


@pytest.mark.parametrize(
    ("decontaminate", "said"),
    [([], "none to keep prompts apart from"), ([{"path": "e.jsonl"}], "7 prompts share 8 words in a row with one")],
)
def test_a_dry_run_names_them_too(decontaminate: list[dict[str, str]], said: str) -> None:
    config = GenerateConfig.model_validate(
        {
            "model": "m",
            "out": "o",
            "prompts": {"path": "p.jsonl"},
            "responses": {"expert": {"count": 0}},
            "decontaminate": decontaminate,
        }
    )
    counts = PromptCounts(**COUNTS | {"duplicates": 3, "near_duplicates": 4, "contaminated": 7})
    preview = Preview(
        prompts=counts,
        num_shards=1,
        shards_published=0,
        prompt_tokens=1,
        given_tokens=0,
        sampled_responses=1,
        carried_samples=0,
        carried_groups=0,
        groups_left_behind=0,
        max_sampled_tokens=1,
    )
    text = printed(show.generation_plan, config, preview, Task(0, 4, "--task"))
    assert re.search(r"^shards +1, 0 of them published already; 1 are for task 0 of 4$", text, re.MULTILINE), text
    assert said in text and "3 rows came before word for word, 4 almost; 0 left out" in text
