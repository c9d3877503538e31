"""What storage does to files: flipped bits, zeroed pages, lost ends, files in each other's place."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

Damage = Callable[[Random, Path, Sequence[Path]], str]


def flip(rng: Random, path: Path, others: Sequence[Path]) -> str:
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def flip_several(rng: Random, path: Path, others: Sequence[Path]) -> str:
    return ", ".join(flip(rng, path, others) for _ in range(rng.randrange(2, 20)))


def flip_near_the_end(rng: Random, path: Path, others: Sequence[Path]) -> str:
    """In the footer of a Parquet file, where there is one."""
    content = bytearray(path.read_bytes())
    place = len(content) - 1 - rng.randrange(min(len(content), 6000))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} flipped"


def zero(rng: Random, path: Path, others: Sequence[Path]) -> str:
    content = bytearray(path.read_bytes())
    length = min(rng.choice([16, 512, 4096]), len(content))
    start = rng.randrange(len(content)) // length * length
    content[start : start + length] = bytes(len(content[start : start + length]))
    path.write_bytes(content)
    return f"{length} bytes zeroed from {start}"


def truncate(rng: Random, path: Path, others: Sequence[Path]) -> str:
    length = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:length])
    return f"cut to {length} bytes"


def append(rng: Random, path: Path, others: Sequence[Path]) -> str:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))
    return "something appended"


def duplicate(rng: Random, path: Path, others: Sequence[Path]) -> str:
    """A block that is written a second time, over the one beside it."""
    content = bytearray(path.read_bytes())
    length = max(1, min(rng.choice([1, 16, 512]), len(content) // 2))
    start = rng.randrange(len(content) - 2 * length + 1)
    content[start + length : start + 2 * length] = content[start : start + length]
    path.write_bytes(content)
    return f"{length} bytes from {start} repeated over what follows"


def change_digit(rng: Random, path: Path, others: Sequence[Path]) -> str:
    """The least visible damage to a file of text: it stays what it was, with another number."""
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if not places:
        return flip(rng, path, others)
    place = rng.choice(places)
    content[place] = rng.choice(b"0123456789")
    path.write_bytes(content)
    return f"digit {place} is now {chr(content[place])}"


def swap(rng: Random, path: Path, others: Sequence[Path]) -> str:
    other = rng.choice([other for other in others if other != path])
    kept = path.with_name(".kept")
    path.rename(kept)
    shutil.copy(other, path)
    kept.rename(other)
    return f"swapped with {other}"


def lose(rng: Random, path: Path, others: Sequence[Path]) -> str:
    path.unlink()
    return "gone"


BINARY: Sequence[Damage] = (
    flip,
    flip,
    flip_several,
    flip_near_the_end,
    flip_near_the_end,
    zero,
    truncate,
    append,
    duplicate,
    swap,
    lose,
)
TEXT: Sequence[Damage] = (flip, flip_several, zero, truncate, append, duplicate, change_digit, change_digit, swap, lose)
