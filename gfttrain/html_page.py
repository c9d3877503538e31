"""Data -> one HTML page that needs nothing else and that nothing in the data can break.

Everything that comes from a run or a model goes into one block of JSON, which no parser of HTML can leave, and the
page's script (page/page.js) only ever makes text of it. A policy in the page lets no other script run.
"""

import base64
import hashlib
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "page"
PLOTLY = "plotly-basic.min.js"  # see page/README.md
MAX_TEXT = 4000  # characters of any one text: a prompt, a name, a setting
JOINERS = "\u200c\u200d"  # of emoji and of several scripts: they steer nothing


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Text with nothing in it that hides or turns other text: control and format characters are named, the end is cut.

    Line ends and tabs stay.
    """
    kept = text[:limit]
    if not (kept.isascii() and kept.isprintable()):
        kept = "".join(_visible_character(character) for character in kept)
    return kept if len(text) <= limit else f"{kept}… ({len(text):,} characters)"


def _visible_character(character: str) -> str:
    if character in "\n\t" or character in JOINERS:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _visible_data(data: Any) -> Any:
    """Every text in it made visible; numbers that JSON has none of are null."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {visible(str(key)): _visible_data(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        if data and isinstance(data[0], int | float):  # a curve
            return data
        return [_visible_data(value) for value in data]
    return data


def to_json(data: Any) -> str:
    """JSON in ASCII that can stand inside a script element: no character of HTML in it, none that ends a line."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=bytes.decode)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def assemble(data: dict[str, Any]) -> str:
    """The page. Only the two scripts whose hashes the page names can run in it, and nothing is loaded."""
    script, plotly = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.js", PLOTLY))
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "STYLE": (PAGE / "page.css").read_text(encoding="utf-8"),
        "PLOTLY": plotly,
        "SCRIPT": script,
        "DATA": to_json(_visible_data(data)),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    # in one pass: nothing that was put in is looked at again
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], template)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
