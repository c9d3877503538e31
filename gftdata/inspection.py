"""`gft inspect`: what a finished data set holds and what was found wrong with it, together, and as one JSON object.

The parts: counts.py (short columns of all groups), content.py (texts and token ids), audit.py (findings). Groups in
full are browse.py's.
"""

from dataclasses import asdict, dataclass
from typing import Any

from gftdata.audit import Finding, audit
from gftdata.content import Content, is_small, look
from gftdata.counts import BINS, Counts, count
from gftdata.locations import is_remote, open_data
from gftdata.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Inspection:
    """A data set as `gft inspect` found it."""

    location: str
    manifest: Manifest
    counts: Counts
    content: Content
    findings: tuple[Finding, ...]

    @property
    def has_problems(self) -> bool:
        return any(finding.severity == "problem" for finding in self.findings)


def inspect_data(location: str, *, deep: bool = False, model: str | None = None) -> Inspection:
    """Count and audit a finished data set, wherever it is. Raises UserError.

    `deep` reads texts and token ids of all groups, not of some, as is done anyway of small data that is here; `model`
    has the tokenizer of the data set.
    """
    data = open_data(location)
    deep = deep or (is_small(data) and not is_remote(location))
    content = look(data, deep=deep, model=model)  # first: a wrong model is said before the work
    counts = count(data, deep=deep)
    return Inspection(location, data.manifest, counts, content, audit(data.manifest, counts, content))


def as_json(found: Inspection) -> dict[str, Any]:
    """Everything that was found, for programs."""
    manifest, counts = found.manifest, found.counts
    counted = asdict(counts) | {"summary": counts.summary.model_dump(mode="json")}
    return {
        "data": found.location,
        "shards": len(manifest.shards),
        "bytes": sum(record.bytes for record in manifest.shards),
        "models": [record.model_dump(mode="json") for record in manifest.models],
        "prompts": manifest.prompts.model_dump(mode="json"),
        "pass_rate_bins": list(BINS),
        "counts": counted,
        "content": asdict(found.content),
        "findings": [asdict(finding) for finding in found.findings],
        "problems": sum(finding.severity == "problem" for finding in found.findings),
    }
