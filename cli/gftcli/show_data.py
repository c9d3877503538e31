"""`gft inspect` on the terminal: numbers, findings, and groups in full. The tables of all other commands: show.py."""

from typing import TYPE_CHECKING

from rich.console import Console

from gftcli.show import decimal, facts, plain, sources, table
from gftdata.types import SELF

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gftdata.audit import Finding
    from gftdata.browse import ShownGroup, ShownResponse
    from gftdata.inspection import Inspection

BAR = 40  # characters of the longest bar
ID = 16  # characters of a prompt_id that tell it from others, and that --id takes


def inspection(console: Console, found: "Inspection") -> None:
    """What is in a data set, and what was found wrong with it."""
    counts = found.counts
    sources(console, counts.summary.sources)
    console.print()
    facts(console, _facts(found))
    if counts.summary.groups:
        console.print()
        _pass_rates(console, found)
    console.print()
    _findings(console, found.findings)
    console.print()
    facts(console, {"looked at": _looked_at(found), "templates": _template_check(found)})
    for left_out in found.content.left_out:
        _line(console, f"not read: {left_out}")


def groups(console: Console, shown: "Sequence[ShownGroup]", *, is_filtered: bool) -> None:
    """Groups in full, as they are: nothing in a text is markup, and nothing steers the terminal."""
    for number, group in enumerate(shown, start=1):
        if number > 1:
            console.print()
        source_id = "" if group.source_id is None else f" (source id {group.source_id})"
        _line(console, f"== group {number} of {len(shown)}: {group.prompt_id}{source_id}", style="bold")
        truth = "none" if group.ground_truth is None else group.ground_truth
        tokens = f"{group.num_prompt_tokens:,} prompt tokens"
        _line(console, f"{group.data_source}, {group.shard}, {tokens}, ground truth: {truth}")
        for message in group.messages:
            console.print()
            _line(console, f"-- {message.role}", style="bold")
            _text(console, message.content)
        for place, response in enumerate(group.responses):
            console.print()
            mark = " * matches" if is_filtered and response.is_match else ""
            _line(console, f"-- response {place}: {_about(response)}{mark}", style="bold")
            _text(console, response.text)
    if not shown:
        _line(console, "no group is like that")


def _facts(found: "Inspection") -> dict[str, str]:
    counts, manifest = found.counts, found.manifest
    summary, lengths = counts.summary, counts.prompt_lengths
    groups, silent, unjudged = summary.groups, summary.groups_without_signal, summary.groups_unjudged
    told = {
        "data set": f"{plain(found.location)} ({len(manifest.shards):,} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB)",
        "groups": f"{groups:,}: {_share(groups - silent - unjudged, groups)} with signal, "
        f"{_share(silent, groups)} with equal rewards throughout, {_share(unjudged, groups)} unjudged",
        "responses": f"{summary.responses:,} ({summary.response_tokens:,} tokens)",
    }
    if lengths is not None:
        told["prompts"] = (
            f"{lengths.mean:,.1f} tokens on average, median {lengths.median:,}, p95 {lengths.p95:,}, "
            f"max {lengths.max:,}"
        )
    told["duplicates"] = _duplicates(found)
    varied = [f"{plain(d.source)} {_share(d.varied_groups, d.groups)}" for d in counts.details if d.groups]
    told["own signal"] = ", ".join(varied) + " of its groups have different rewards" if varied else "none"
    gaps = [
        f"{plain(detail.source)} {detail.logprob_gap:+.3f}"
        for detail in counts.details
        if detail.logprob_gap is not None and detail.source != SELF
    ]
    if gaps:
        told["drift"] = f"log-prob per token above (+) or below (-) that of self: {', '.join(gaps)} nats"
    return told


def _duplicates(found: "Inspection") -> str:
    counts = found.counts
    repeated = counts.repeated_prompts
    prompts = "prompts not compared (--deep)" if repeated is None else f"{repeated.count:,} prompts came before"
    identical = sum(source.identical for source in counts.summary.sources)
    said = "" if counts.texts_compared else " (says the manifest; --deep compares)"
    return f"{prompts}; {identical:,} responses identical to an earlier one of their group{said}"


def _pass_rates(console: Console, found: "Inspection") -> None:
    """A text histogram: of self where there is one, otherwise of whole groups."""
    from gftdata.counts import BINS

    counts = found.counts
    own = next((detail for detail in counts.details if detail.source == SELF), None)
    numbers, whose = (counts.pass_rates, "all responses") if own is None else (own.pass_rates, SELF)
    rows = table(f"pass rate of {whose}", "groups", "share")
    rows.add_column("", justify="left", no_wrap=True)
    longest, total = max(1, *numbers), max(1, sum(numbers))
    for name, number in zip(BINS, numbers, strict=True):
        rows.add_row(name, f"{number:,}", f"{number / total:.1%}", "#" * -(-BAR * number // longest))
    console.print(rows, markup=False)


def _findings(console: Console, findings: "Sequence[Finding]") -> None:
    if not findings:
        _line(console, "findings: none")
    for finding in findings:
        what = plain(finding.what)
        line = f"{finding.severity}: {finding.kind}: {finding.count:,} of {finding.of:,} {what}"
        _line(console, line, style="bold red" if finding.severity == "problem" else "bold")
        if finding.examples:
            _line(console, f"  e.g. {', '.join(prompt_id[:ID] for prompt_id in finding.examples)}")
        _line(console, f"  {plain(finding.advice)}")


def _looked_at(found: "Inspection") -> str:
    content, groups = found.content, found.counts.summary.groups
    if content.groups >= groups:
        return "all groups, texts and token ids included"
    return f"short columns of all groups; texts and token ids of {content.groups:,} of {groups:,} (--deep: of all)"


def _template_check(found: "Inspection") -> str:
    from gftdata.tokens import NO_TEMPLATE_HASH

    content = found.content
    if found.manifest.tokenizer.template_hash == NO_TEMPLATE_HASH:
        ends = "the tokenizer has no chat template"
    elif content.generation_prompt is None:
        ends = "how prompts end was not compared: no end of a turn before the generation prompt"
    else:
        ends = f"how {content.groups:,} prompts end was compared"
    if content.encoded:
        return f"{ends}; {content.encoded:,} prompts were encoded again with {plain(content.encoded_by)}"
    return f"{ends}; prompts were not encoded again: {plain(content.encoded_by)}"


def _about(response: "ShownResponse") -> str:
    reward = "none" if response.reward is None else f"{response.reward:g}"
    return (
        f"{response.source} ({response.model}), reward {reward} ({response.reward_status}), {response.finish_reason}, "
        f"{response.num_tokens:,} tokens, log-prob/token {decimal(response.mean_ref_logprob)}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(plain(text), style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _text(console: Console, text: str) -> None:
    """A text of several lines: line breaks and tabs stay."""
    for line in str(text).split("\n"):
        told = "\t".join(map(plain, line.split("\t")))
        console.print(told, soft_wrap=True, highlight=False, markup=False, emoji=False)
