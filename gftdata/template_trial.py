"""Renders a chat template of unknown origin once, in a process of its own that may be killed: is it safe to use?

`check_template` starts this file as a script, which imports nothing of ours. Sandboxed as transformers renders it, a
template cannot reach Python, but it can loop for ever or fill the memory. What becomes of the text is tokens.py's.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

TRIAL_S = 20.0
TRIAL_GB = 1.0
MAX_TEMPLATE, MAX_RENDERED = 2**20, 2**20  # characters; of the template, and of what it makes of two short messages


@cache
def check_template(template: str) -> str:
    """Why a template must not be used; empty where it renders two short messages, or says in time that it does not."""
    if len(template) > MAX_TEMPLATE:
        return f"it has {len(template):,} characters, allowed are {MAX_TEMPLATE:,}"
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__))],
            input=json.dumps(template).encode(),
            capture_output=True,
            timeout=TRIAL_S,
            env={},  # what is in the environment is none of its business
        )
    except subprocess.TimeoutExpired:
        return f"rendering two short messages takes more than {TRIAL_S:g} seconds"
    if done.returncode != 0 or not done.stdout:
        return f"rendering two short messages takes more than {TRIAL_GB:g} GiB, or ends the process"
    said: str = json.loads(done.stdout)
    return said


def _render(template: str) -> str:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which transformers adds: here what is in it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for messages, prompts in ((chat, False), (chat[:1], True)):
        try:
            rendered = environment.from_string(template).render(messages=messages, add_generation_prompt=prompts)
        except SecurityError as error:
            return f"it reaches for what the sandbox forbids: {str(error)[:200]}"
        except MemoryError:
            return f"rendering two short messages takes more than {TRIAL_GB:g} GiB"
        except Exception:  # it lacks what only a tokenizer has: whoever renders it in earnest says so
            continue
        if len(rendered) > MAX_RENDERED:
            return f"it makes {len(rendered):,} characters of two short messages"
    return ""


def _main() -> None:
    if sys.platform == "linux":
        import resource

        limit = int(TRIAL_GB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout.write(json.dumps(_render(json.load(sys.stdin))))


if __name__ == "__main__":
    _main()
