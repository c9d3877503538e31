"""Duplicates and contamination against exact sets and brute force, with flat memory and no file left."""

import hashlib
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gftdata import quality
from gftdata.config import EvalSetConfig
from gftdata.errors import UserError
from gftdata.quality import Contamination, NearDuplicates, Occurrences, read_eval_texts, shingles, words

OneLine = Callable[[BaseException], str]
WriteJsonl = Callable[..., Path]
VOCABULARY = [f"{a}{b}" for a in "bcdfghjklmnpqrstvwxz" for b in range(100)]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of these tests; whatever they do, nothing stays there and no file stays open."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    assert nameless_files(folder) == []


def nameless_files(folder: Path) -> list[int]:
    """Sizes of this process's open files below a folder that have no name any more."""
    sizes = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the listing itself
            continue
        if target.startswith(str(folder)) and target.endswith(" (deleted)"):
            sizes.append(entry.stat().st_size)
    return sizes


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def sentence(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(length)]


def changed(rng: random.Random, text: list[str], count: int) -> list[str]:
    other = list(text)
    for at in rng.sample(range(len(text)), count):
        other[at] = rng.choice(VOCABULARY)
    return other


def naive_words(text: str) -> list[str]:
    """For text whose words are ASCII."""
    return re.sub("[^a-z0-9]", " ", text.lower()).split()


def naive_ngrams(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = naive_words(text)
    return {tuple(found[i : i + ngram]) for i in range(len(found) - ngram + 1)}


def jaccard(a: str, b: str) -> float:
    mine, yours = naive_ngrams(a, 5), naive_ngrams(b, 5)
    return len(mine & yours) / len(mine | yours)


def found_near(texts: Iterable[str], similarity: float = 0.8) -> list[bool]:
    with NearDuplicates(similarity) as near:
        return [near.is_near(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5, isn't it?", "it s 3 5 isn t it"),
        ("\uff21\uff22\uff11\uff12 ﬁne Ⅳ x²", "ab12 fine iv x2"),
        ("fill_in the ____ ÉTÉ", "fill in the été"),
        ("2只貓と한국、カナabc", "2 只 貓 と 한 국 カ ナ abc"),
        ("ｶﾅ・ー𠮷", "カ ナ ー 𠮷"),
        ("и Ωω", "и ωω"),
        ("... -- \n\t \uff01\uff1f", ""),
        ("", ""),
        ("half a pair \ud800x", "half a pair x"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@given(st.lists(st.sampled_from(VOCABULARY)), st.randoms())
def test_words_do_not_depend_on_case_and_punctuation(text: list[str], rng: random.Random) -> None:
    marks = [" ", ", ", "\n", " (", ") ", "…", "。", "_", "**"]
    written = "".join(rng.choice([w, w.upper(), w.title()]) + rng.choice(marks) for w in text)
    assert words(written) == words(" ".join(text)) == text


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 6))
def test_two_runs_of_words_have_one_hash_where_they_are_one_run(text: list[str], ngram: int) -> None:
    hashes = shingles(" ".join(text), ngram)
    runs = [tuple(text[i : i + ngram]) for i in range(max(1, len(text) - ngram + 1))] if text else []
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))


def test_a_short_text_is_compared_whole_and_with_its_signs() -> None:
    def same(a: str, b: str) -> bool:
        return shingles(a, 5).tolist() == shingles(b, 5).tolist()

    assert same("What is 12+34?", "what is  12 + 34")
    assert same("$12+34$.", "12 + 34")
    for other in ("12 + 35", "12 - 34", "12 * 34", "12 34", "1 2 + 34", "12 + 34 =", "12 + 34 + 0", "(12 + 34)"):
        assert not same("12 + 34", other), other
    assert not same("a b c d", "a b c d e")


def test_occurrences_count_as_a_counter_does() -> None:
    rng, expected = random.Random(0), Counter[bytes]()
    with Occurrences() as seen:
        for _ in range(3000):
            key = digest(rng.randrange(800))
            expected[key] += 1
            assert seen.count(key) == expected[key]
        assert seen.count(digest(0)[:-1]) == 1, "another digest, although it begins alike"


def test_near_duplicates_by_the_exact_jaccard_similarity() -> None:
    rng = random.Random(1)
    below, above = [], []
    with NearDuplicates(0.8) as near:
        for _ in range(400):
            first = sentence(rng, 100)
            second = changed(rng, first, rng.randint(1, 8))
            assert not near.is_near(" ".join(first))
            said, exact = near.is_near(" ".join(second)), jaccard(" ".join(first), " ".join(second))
            if exact >= 0.88:
                above.append(said)
            elif exact <= 0.68:
                below.append(said)
    assert len(above) > 50 and len(below) > 100
    assert np.mean(above) > 0.95 and np.mean(below) < 0.02


@pytest.mark.parametrize("similarity", [0.05, 0.3, 0.5, 0.9, 0.97, 1.0])
def test_every_similarity_keeps_its_side(similarity: float) -> None:
    rng = random.Random(2)
    first = [sentence(rng, 60) for _ in range(60)]
    half = [text[:40] + sentence(rng, 20) for text in first]
    exact = float(np.mean([jaccard(" ".join(a), " ".join(b)) for a, b in zip(first, half, strict=True)]))
    found = found_near((" ".join(text) for text in [*first, *half, *first]), similarity)
    assert found[:60] == [False] * 60
    assert found[120:] == [True] * 60, "the same text again"
    if abs(exact - similarity) > 0.15:
        assert (np.mean(found[60:120]) > 0.5) == (exact > similarity)
        assert not 0.1 < np.mean(found[60:120]) < 0.9


def test_the_first_one_wins_and_what_is_near_is_not_remembered() -> None:
    rng = random.Random(3)
    first = sentence(rng, 200)
    second = sentence(rng, 20) + first[20:]
    third = second[:20] + sentence(rng, 20) + first[40:]
    a, b, c = (" ".join(text) for text in (first, second, third))
    assert jaccard(a, b) > 0.77 and jaccard(b, c) > 0.77 and jaccard(a, c) < 0.67
    assert found_near([a, b, c, c, b, a], 0.72) == [False, True, False, True, True, True]
    assert found_near([a, c], 0.72) == [False, False]


def test_short_texts_are_near_their_equals_only() -> None:
    texts = ["12 + 34", "12 + 35", "12 - 34", "12+34?", "", "?!", "?!", "", "12 + 34 + 5", "十二", "十 二"]
    assert [text for text, near in zip(texts, found_near(texts), strict=True) if near] == ["12+34?", "十 二"]


def test_a_long_text_is_no_special_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    texts = [" ".join(sentence(rng, 3000)) for _ in range(3)]
    with NearDuplicates(0.8) as whole:
        expected = [whole._signature(shingles(text, 5)).tolist() for text in texts]
    monkeypatch.setattr(quality, "_SHINGLES_AT_ONCE", 7)
    with NearDuplicates(0.8) as parts:
        assert [parts._signature(shingles(text, 5)).tolist() for text in texts] == expected


def test_wording_that_all_prompts_share_neither_hides_duplicates_nor_piles_up() -> None:
    rng = random.Random(5)
    wording = sentence(rng, 100)
    texts = [wording[:50] + sentence(rng, 20) + wording[50:] for _ in range(400)]
    with NearDuplicates(0.8) as near:
        distinct = [near.is_near(" ".join(text)) for text in texts]
        again = [[*text[:55], *sentence(rng, 1), *text[56:]] for text in texts[300:]]
        found = [near.is_near(" ".join(text)) for text in again]
        (most,) = near._db.execute("SELECT max(n) FROM (SELECT count(*) AS n FROM bands GROUP BY key)").fetchone()
    assert 0.5 < jaccard(" ".join(texts[0]), " ".join(texts[1])) < 0.75
    assert np.mean(distinct) < 0.05 and np.mean(found) > 0.9
    assert most == quality.CROWD


def test_the_same_in_every_process() -> None:
    rng = random.Random(6)
    texts = [" ".join(changed(rng, sentence(random.Random(n % 40), 50), rng.randint(0, 4))) for n in range(200)]
    code = (
        "import sys\n"
        "from gftdata.quality import NearDuplicates, shingles\n"
        f"texts = {texts!r}\n"
        "with NearDuplicates(0.8) as near:\n"
        "    print([near.is_near(text) for text in texts], [shingles(text, 8).tolist() for text in texts])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    here = f"{found_near(texts)} {[shingles(text, 8).tolist() for text in texts]}\n"
    assert said == {here.encode()}
    assert 20 < sum(found_near(texts)) < 180


def test_memory_does_not_grow_with_what_is_remembered(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_CACHE_KIB", 100)  # what SQLite holds in memory
    rng = random.Random(7)

    def growth(each: Callable[[int], object], first: int, last: int) -> int:
        for n in range(first):
            each(n)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for n in range(first, last):
                each(n)
            return tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()

    with Occurrences() as seen:
        assert growth(lambda n: seen.count(digest(n)), 1000, 20_000) < 50_000
        (size,) = nameless_files(temporary)
        assert size > 700_000 and list(temporary.iterdir()) == [], "they are on the disk"
    with NearDuplicates(0.8) as near:
        assert growth(lambda _: near.is_near(" ".join(sentence(rng, 12))), 1000, 20_000) < 50_000
        (size,) = nameless_files(temporary)
        assert size > 10_000_000 and list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", [Occurrences, lambda: NearDuplicates(0.8)])
def test_nothing_is_left_after_an_error(temporary: Path, kind: Callable[[], Any]) -> None:
    with pytest.raises(ZeroDivisionError), kind():
        assert len(nameless_files(temporary)) == 1
        raise ZeroDivisionError
    assert nameless_files(temporary) == []


@pytest.mark.parametrize("kind", [Occurrences, lambda: NearDuplicates(0.8)])
def test_a_temporary_folder_that_is_full_or_missing(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine, kind: Callable[[], Any]
) -> None:
    rng = random.Random(8)
    monkeypatch.setattr(quality, "_CACHE_KIB", 100)  # what does not reach the disk cannot fill it

    def fill(into: Any) -> None:
        for n in range(20_000):
            into.count(digest(n)) if isinstance(into, Occurrences) else into.is_near(" ".join(sentence(rng, 12)))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with kind() as into:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            with pytest.raises(UserError) as caught:
                fill(into)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(temporary) in one_line(caught.value) and "TMPDIR" in str(caught.value)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "none"))
    with pytest.raises(UserError) as caught:
        kind()
    assert "TMPDIR" in one_line(caught.value)


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=14), max_size=5),
    st.lists(st.sampled_from("abc"), max_size=14),
    st.integers(1, 8),
)
def test_contamination_is_what_brute_force_finds(evaluated: list[list[str]], prompt: list[str], ngram: int) -> None:
    expected = any(
        prompt[i : i + ngram] == text[j : j + ngram]
        for text in evaluated
        for i in range(len(prompt) - ngram + 1)
        for j in range(len(text) - ngram + 1)
    ) or any(prompt == text for text in evaluated if 0 < len(text) < ngram)
    contamination = Contamination((" ".join(text) for text in evaluated), ngram)
    assert contamination.found_in(" ".join(prompt)) == expected


def test_contamination_of_texts_that_look_different() -> None:
    rng = random.Random(9)
    evaluated = [sentence(rng, rng.randint(8, 60)) for _ in range(200)]
    contamination = Contamination(" ".join(text) for text in evaluated)
    for text in evaluated:
        at = rng.randrange(len(text) - 7)
        run = text[at : at + 8]
        around = ", ".join([*sentence(rng, 5), *run, *sentence(rng, 5)]).upper()
        assert contamination.found_in(around)
        assert contamination.found_in("\n".join(run))
        assert not contamination.found_in(" ".join([*run[:4], "between", *run[4:]]))
        assert not contamination.found_in(" ".join(run[:7]))
    assert not any(contamination.found_in(" ".join(sentence(rng, 60))) for _ in range(500))


def test_contamination_of_short_texts_is_that_of_the_whole() -> None:
    contamination = Contamination(["12 + 34 = ?", "Why?", "", "…", "What is the value of 12 + 34, exactly?"])
    assert contamination.found_in("Say: what is the value of (12 + 34) exactly"), "8 words are not a short text"
    assert contamination.found_in("12+34=") and contamination.found_in("why")
    for other in ("12-34=", "12 + 34 = 46", "Why not?", "", "?"):
        assert not contamination.found_in(other)


def test_nothing_is_in_an_empty_evaluation_set() -> None:
    contamination = Contamination([])
    assert not contamination.found_in("a b c d e f g h i") and not contamination.found_in("")


def test_an_ngram_of_an_evaluation_takes_8_bytes() -> None:
    rng = random.Random(10)
    texts = [" ".join(sentence(rng, 60)) for _ in range(500)]
    contamination = Contamination(texts)
    distinct = len(set().union(*(naive_ngrams(text, 8) for text in texts)))
    assert contamination._known.nbytes == 8 * (distinct + 1)


EVAL_ROWS = [
    {"question": "1+1=", "chat": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    {"question": "2+2=", "chat": [{"role": "user", "content": "v"}]},
]  # fmt: skip


def eval_texts(**config: Any) -> list[str]:
    return list(read_eval_texts(EvalSetConfig(**config)))


def test_evaluation_texts_of_every_kind_of_source(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    rows = [{**row, "info": {"text": f"t{n}"}} for n, row in enumerate(EVAL_ROWS)]
    table = tmp_path / "e.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl = write_jsonl(rows, "folder/test.jsonl")
    for origin in ({"path": str(jsonl)}, {"path": str(table)}, {"dataset": str(folder), "split": "test"}):
        assert eval_texts(**origin) == ["1+1=", "2+2="]
        assert eval_texts(**origin, column="info.text") == ["t0", "t1"]
        assert eval_texts(**origin, column="chat") == ["u", "v"]


def test_what_is_wrong_with_an_evaluation_set(tmp_path: Path, write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    def refusal(**config: Any) -> str:
        with pytest.raises(UserError) as caught:
            eval_texts(**config)
        return one_line(caught.value)

    assert refusal(path="none.jsonl") == "none.jsonl: no such prompt file (decontaminate.path)"
    assert "(decontaminate.path)" in refusal(path=str(write_jsonl([], "e.csv")))
    assert "(decontaminate.dataset)" in refusal(dataset=str(tmp_path / "none"))
    empty = write_jsonl([], "empty.jsonl")
    assert refusal(path=str(empty)) == f"{empty}: holds no evaluation texts (decontaminate)"
    path = write_jsonl([*EVAL_ROWS, {"text": "x"}])
    assert refusal(path=str(path)) == f"{path}: row 3: no column `question` (decontaminate.column); it has: text"
    for wrong in (None, "", 5, [], ["text"], [{"role": "user"}], [{"role": "user", "content": None}], {"content": "x"}):
        path = write_jsonl([EVAL_ROWS[0], {"question": wrong}])
        said = refusal(path=str(path))
        assert said.startswith(f"{path}: row 2: column `question` (decontaminate.column): expected a text") and (
            said.endswith(f"found {wrong!r}")
        )
