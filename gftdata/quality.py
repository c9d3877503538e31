"""Which prompts come again, word for word or almost, and which an evaluation set holds too.

What grows with the number of prompts lies in a temporary SQLite file, so that this process needs as much memory for a
million prompts as for a thousand. The file goes to the system's temporary folder (TMPDIR) and has no name there: it is
gone when this process is. `prepare.py` decides what becomes of the prompts found here.
"""

import re
import sqlite3
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from gftdata.config import EvalSetConfig
from gftdata.errors import UserError, first_line

NEAR_NGRAM = 5  # words of a shingle
NUM_PERM = 128  # hash functions of a signature: the estimate's standard error is sqrt(J (1 - J) / 128), at most 0.044
CROWD = 32  # texts remembered under one band
_SHINGLES_AT_ONCE = 4096
_CACHE_KIB = 4096

# Scripts that are written without spaces, or of which a character says about as much as a word: Han, Kana, Hangul.
_CHARACTERS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
)
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")
# The words again, and every sign that is not a sentence's: in `12 + 34` and `12 - 34` nothing else differs.
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[^\w\s.,;:?!$`'\"\u2018-\u201f\u3001\u3002\u00bf\u00a1]")

Hashes = npt.NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Lower-cased NFKC words: runs of letters and digits, and each Han, Kana or Hangul character by itself.

    Punctuation and underscores separate. So do vowel signs of Indic scripts and of Thai: a word there is a syllable.
    """
    return _WORD.findall(_normalised(text))


def shingles(text: str, ngram: int) -> Hashes:
    """64-bit hashes of every run of `ngram` words, in order; the same in every process.

    A text of fewer words has one, of all its words and signs (`12 + 34` is not `12 - 34`); a text without words none.
    """
    found = words(text)
    if not found:
        runs = []
    elif len(found) < ngram:
        runs = [" ".join(_WORD_OR_SIGN.findall(_normalised(text)))]
    else:
        runs = [" ".join(found[i : i + ngram]) for i in range(len(found) - ngram + 1)]
    return np.frombuffer(b"".join(blake2b(run.encode(), digest_size=8).digest() for run in runs), dtype="<u8")


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


class Occurrences:
    """Counts digests, on disk."""

    def __init__(self) -> None:
        self._db = _scratch("CREATE TABLE seen (digest BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def count(self, digest: bytes) -> int:
        """How often this digest has been seen, this time included. Raises UserError where the disk is full."""
        try:
            if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, 1)", (digest,)).rowcount:
                return 1
            self._db.execute("UPDATE seen SET count = count + 1 WHERE digest = ?", (digest,))
            (count,) = self._db.execute("SELECT count FROM seen WHERE digest = ?", (digest,)).fetchone()
        except sqlite3.OperationalError as error:
            raise _no_room(error) from None
        return int(count)


class NearDuplicates:
    """Finds texts with almost the words of an earlier one: MinHash with LSH banding (Broder 1997; Leskovec, Rajaraman
    and Ullman, Mining of Massive Datasets, 3.4).

    Two texts are near where the estimated Jaccard similarity of their sets of word 5-grams is `similarity` or more. The
    estimate is the share of 128 MinHash values on which they agree. Only texts that agree in one whole band of values
    are compared: up to 10 % of the pairs at `similarity` itself do not, and up to 2 % of those 0.05 above it (computed
    for 0.1 to 0.95). Signatures are datasketch's; its LSH index is not used, because it keeps every text in memory (or
    in a database server).
    """

    def __init__(self, similarity: float) -> None:
        from datasketch import MinHash, MinHashLSH

        # A comparison costs little and a miss is final, hence the weights. Over 0.95 datasketch finds no two bands, and
        # bands for a lower similarity miss fewer.
        bands = MinHashLSH(threshold=min(similarity, 0.95), num_perm=NUM_PERM, weights=(0.05, 0.95))
        self._num_bands, self._rows = int(bands.b), int(bands.r)
        self._enough = similarity * NUM_PERM - 1e-9
        # scheme and seed are datasketch's defaults today; said here so that a later version finds the same duplicates
        self._minhash = MinHash(num_perm=NUM_PERM, seed=1, hashfunc=int, scheme="affine32")
        self._remembered = 0
        self._db = _scratch(
            "CREATE TABLE bands (key INTEGER, text INTEGER, PRIMARY KEY (key, text)) WITHOUT ROWID;"
            "CREATE TABLE signatures (text INTEGER PRIMARY KEY, signature BLOB)"
        )
        self._find = f"SELECT key, text FROM bands WHERE key IN ({', '.join('?' * self._num_bands)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def is_near(self, text: str) -> bool:
        """Whether a text is near an earlier one that was not itself near another; if not, it is remembered.

        A text of fewer than 5 words is near its equals only, one without words near none. Raises UserError where the
        disk is full.
        """
        hashes = shingles(text, NEAR_NGRAM)
        if not len(hashes):
            return False
        signature = self._signature(hashes)
        keys = self._keys(signature)
        try:
            crowds: dict[int, int] = {}
            candidates: set[int] = set()
            for key, number in self._db.execute(self._find, keys):
                crowds[key] = crowds.get(key, 0) + 1
                candidates.add(number)
            if candidates and self._agrees(signature, candidates):
                return True
            # A band that many texts share without being near is wording that the source puts into every prompt. To
            # compare with all of them would take time that grows with the square of the prompts, and real duplicates
            # share other bands too.
            rows = ((key, self._remembered) for key in keys if crowds.get(key, 0) < CROWD)
            self._db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", rows)
            self._db.execute("INSERT INTO signatures VALUES (?, ?)", (self._remembered, signature.tobytes()))
        except sqlite3.OperationalError as error:
            raise _no_room(error) from None
        self._remembered += 1
        return False

    def _signature(self, hashes: Hashes) -> npt.NDArray[np.uint32]:
        self._minhash.clear()
        for start in range(0, len(hashes), _SHINGLES_AT_ONCE):
            self._minhash.update_batch((hashes[start : start + _SHINGLES_AT_ONCE] >> np.uint64(32)).tolist())
        signature: npt.NDArray[np.uint32] = self._minhash.hashvalues
        return signature

    def _keys(self, signature: npt.NDArray[np.uint32]) -> list[int]:
        """A 63-bit key for each band, which SQLite's integers hold."""
        data, width = signature.tobytes(), self._rows * signature.itemsize
        bands = (data[band * width : (band + 1) * width] for band in range(self._num_bands))
        return [int.from_bytes(blake2b(band, digest_size=8).digest(), "little") >> 1 for band in bands]

    def _agrees(self, signature: npt.NDArray[np.uint32], candidates: set[int]) -> bool:
        places = ", ".join(map(str, candidates))
        rows = self._db.execute(f"SELECT signature FROM signatures WHERE text IN ({places})")
        others = np.frombuffer(b"".join(blob for (blob,) in rows), dtype=signature.dtype).reshape(-1, NUM_PERM)
        return bool((np.count_nonzero(others == signature, axis=1) >= self._enough).any())


class Contamination:
    """Finds texts that share a run of words with a text of an evaluation set, by exact n-grams (Brown et al. 2020,
    appendix C, which takes 13 words).

    8 bytes of memory for each distinct n-gram of the evaluation texts, and about three times that while they are read:
    a set of 10,000 questions of 100 words holds 7 MB. That two different n-grams have the same 64-bit hash is as likely
    as 5e-14 for each n-gram looked up among a million.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 8) -> None:
        self._ngram = ngram
        # the largest value stands at the end, so that whatever is looked up has a place
        last = np.full(1, np.iinfo(np.uint64).max, np.uint64)
        self._known: Hashes = np.unique(np.concatenate([last, *(shingles(text, ngram) for text in texts)]))

    def found_in(self, text: str) -> bool:
        """Whether a text has `ngram` words in a row in common with an evaluation text.

        An evaluation text of fewer words is found where it is the whole text.
        """
        hashes = shingles(text, self._ngram)
        return bool((self._known[np.searchsorted(self._known, hashes)] == hashes).any())


def read_eval_texts(config: EvalSetConfig) -> Iterator[str]:
    """Stream the texts of an evaluation set: the column's text, or the last message of its chat.

    Raises UserError, naming file, row and column, for what cannot be read, a cell without text, and an empty set.
    """
    from gftdata.prompts import cell, file_rows, hub_rows  # which counts digests with this module

    if config.path is not None:
        where, rows = config.path, file_rows(config.path, "decontaminate.path")
    else:
        assert config.dataset is not None
        where = config.dataset
        rows = hub_rows(config.dataset, config.subset, config.split, "decontaminate.dataset")
    number = 0
    for number, row in enumerate(rows, start=1):
        place = f"{where}: row {number}"
        value = cell(row, config.column, place, "decontaminate.column")
        is_chat = isinstance(value, list) and value and isinstance(value[-1], Mapping)
        text = value[-1].get("content") if is_chat else value
        if not isinstance(text, str) or not text:
            raise UserError(
                f"{place}: column `{config.column}` (decontaminate.column): expected a text, or a list of "
                f"{{role, content}}, found {value!r}"
            )
        yield text
    if not number:
        raise UserError(f"{where}: holds no evaluation texts (decontaminate)")


def _scratch(tables: str) -> sqlite3.Connection:
    """An SQLite database in a file without a name, in one transaction that never ends."""
    try:
        with tempfile.TemporaryDirectory(prefix="gft-", ignore_cleanup_errors=True) as folder:
            db = sqlite3.connect(Path(folder) / "scratch.sqlite", isolation_level=None)
            try:
                # nobody reads this file after a crash: no journal, no waiting for the disk
                db.executescript(
                    "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;"
                    f"PRAGMA cache_size = -{_CACHE_KIB}; {tables}; BEGIN"
                )
            except BaseException:
                db.close()
                raise
            return db
    except (sqlite3.OperationalError, OSError) as error:
        raise _no_room(error) from None


def _no_room(error: Exception) -> UserError:
    return UserError(
        f"{tempfile.gettempdir()}: cannot hold what finding duplicates remembers: {first_line(error)}; "
        "make room there, or set TMPDIR to another folder"
    )
