"""See __init__.py."""

from typing import Any


def rotary_embedding(*_: Any, **__: Any) -> None:
    raise RuntimeError("SGLang calls vllm's rotary_embedding on this path: the stand-in no longer serves")
