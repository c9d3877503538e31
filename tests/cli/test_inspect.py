"""`gft inspect` as its user meets it: tables, JSON, exit codes, groups in full, and hostile texts."""

import json
from pathlib import Path
from typing import Any

import pytest
from aid.commands import Gft
from aid.data_sets import END, Made, group, save

CLEAN = [Made("expert", finish="given"), Made(text="one"), Made(text="two", reward=0.0), Made(text="three")]
EVIL = "\x1b[2J\x1b]0;title\x07[red]not markup[/red] :smile:\r\u202egone\x9b1m"


@pytest.fixture
def clean() -> Path:
    return save(Path("clean"), [[group(number, CLEAN) for number in range(6)]])


@pytest.fixture
def spoiled(gft: Gft) -> Path:
    """In group 2 one response is cut, and its texts are hostile."""
    groups = [group(number, CLEAN) for number in range(6)]
    hostile = Made("teacher:\x1b[31m", text=f"a\tb\n{EVIL}", finish="length", ids=(11, 12), logprob=-2.0)
    groups[2] = group(2, [*CLEAN, hostile], question=EVIL, ground_truth=EVIL, source_id=EVIL, data_source=EVIL)
    return save(Path("spoiled"), [groups])


def harmless(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def test_the_summary_of_clean_data(gft: Gft, clean: Path) -> None:
    done = gft("inspect", clean)
    assert done.code == 0, done.err
    lines = {line.split("  ")[0]: line for line in done.out.splitlines() if line}
    assert lines["self"].split()[:4] == ["self", "18", "0.667", "0.667"]
    assert "6: 6 (100.0%) with signal, 0 (0.0%) with equal rewards" in lines["groups"]
    assert "0 prompts came before; 0 responses identical" in lines["duplicates"]
    assert "expert +0.000 nats" in lines["drift"]
    assert lines["(.5, .75]"].split()[2:] == ["6", "100.0%", "#" * 40]
    assert lines["0"].split() == ["0", "0", "0.0%"]
    assert "findings: none" in done.out
    assert "all groups, texts and token ids included" in lines["looked at"]
    assert "6 prompts end was compared; prompts were not encoded again" in lines["templates"]
    assert gft("inspect", clean, "--strict").code == 0


def test_findings_and_the_exit_code(gft: Gft, spoiled: Path) -> None:
    done = gft("inspect", spoiled)
    assert done.code == 0 and harmless(done.out), done.out
    assert "problem: truncated: 1 of 1 responses of teacher:\\x1b[31m were cut at the length limit" in done.out
    assert f"  e.g. {2:064x}"[:23] + "\n" in done.out
    strict = gft("inspect", spoiled, "--strict")
    assert strict.code == 1 and strict.out == done.out
    as_json = gft("inspect", spoiled, "--strict", "--json")
    assert as_json.code == 1
    read = json.loads(as_json.out)
    assert read["problems"] == 1 and read["findings"][0]["kind"] == "truncated"
    assert len(as_json.out.splitlines()) == 1


def test_groups_in_full(gft: Gft, spoiled: Path) -> None:
    done = gft("inspect", spoiled, "--show", 2, "--source", "self", "--max-reward", "0.5", "--signal")
    assert done.code == 0, done.err
    assert done.out.count("== group") == 2 and done.out.count("* matches") == 2
    assert (
        "-- response 2: self (m@1), reward 0 (ok), stop, 3 tokens, log-prob/token -0.500 * matches\ntwo\n" in done.out
    )
    assert "-- user\nquestion 0\n" in done.out and "ground truth: 1" in done.out
    assert gft("inspect", spoiled, "--show", 1, "--no-signal").out == "no group is like that\n"


def test_nothing_in_a_group_steers_the_terminal(gft: Gft, spoiled: Path) -> None:
    done = gft("inspect", spoiled, "--show", 1, "--min-tokens", 2, "--id", f"{2:064x}"[:64])
    assert done.code == 0 and harmless(done.out), done.out
    assert "a       b\n\\x1b[2J\\x1b]0;title\\x07[red]not markup[/red] :smile:\\r\\u202egone\\x9b1m\n" in done.out
    assert done.out.count("[red]not markup[/red]") == 5
    (read,) = json.loads(gft("inspect", spoiled, "--show", 1, "--id", f"{2:064x}", "--json").out)
    assert read["responses"][4]["text"] == f"a\tb\n{EVIL}"


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["nowhere"], "nowhere: no such data set folder"),
        (["clean", "--source", "self"], "add --show N"),
        (["clean", "--show", "1", "--strict"], "leave --strict, --deep and --model out"),
        (["clean", "--show", "1", "--source", "nobody"], "no responses of source `nobody`"),
        (["clean", "--model", "nowhere/at/all"], "nowhere/at/all: no such model folder"),
    ],
)
def test_mistakes_end_in_one_line(gft: Gft, clean: Path, arguments: list[str], saying: str) -> None:
    done = gft("inspect", *arguments)
    assert done.code == 2 and done.err.startswith("error: ") and len(done.err.splitlines()) == 1
    assert saying in done.err


def test_an_empty_response_is_a_problem_of_the_whole(gft: Gft) -> None:
    folder = save(Path("empty"), [[group(0, [*CLEAN, Made(text="", ids=(END,))])]])
    done: Any = gft("inspect", folder, "--strict", "--deep")
    assert done.code == 1 and "1 of 4 responses of self are nothing but an end token" in done.out
