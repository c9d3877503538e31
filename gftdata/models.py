"""Which model exactly: a name for people, a revision for comparison."""

import hashlib
from pathlib import Path
from typing import Any

from gftdata.errors import UserError, first_line

PATHS = ("model", "path", "dataset", "reuse", "extend", "serves", "options")
GENERIC_NAMES = ("model", "final")  # of folders, that tell no model from another
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def model_revision(model: str) -> str:
    """The exact version of a model: its Hub commit, or for a folder a hash over its weights and configuration.

    Weight files are hashed by name, size and their first and last MiB: enough to tell two checkpoints apart, and fast
    for any size of model.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_commit(model)
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *(p for pattern in WEIGHTS for p in folder.glob(pattern))]):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read(2**20))
    return digest.hexdigest()


def shown_name(model: str) -> str:
    """A model's name for records that leave the machine: a Hub id as it is, of a folder only its last part or two."""
    path = Path(model)
    if not path.is_dir() and not path.is_absolute():
        return model
    return path.name if path.name not in GENERIC_NAMES else f"{path.parent.name}/{path.name}"


def shareable(value: Any, key: str = "") -> Any:
    """A recipe as it may be shared: absolute paths are cut to their last part. Whatever is in `options` may be one."""
    if isinstance(value, dict):
        return {name: shareable(item, key if key == "options" else name) for name, item in value.items()}
    if isinstance(value, list):
        return [shareable(item, key) for item in value]
    if key in PATHS and isinstance(value, str) and Path(value).is_absolute():
        return shown_name(value) if Path(value).is_dir() else Path(value).name
    return value


def context_length(model: str) -> int | None:
    """Tokens the model can hold, prompt and response together, where its configuration says."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what a library makes of damaged or hostile files: anything
        raise UserError(f"{model}: cannot read its configuration: {first_line(error)[:300]}") from None
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def _hub_commit(model: str) -> str:
    """The commit of the snapshot that transformers loads; its configurations no longer say."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{model}: cannot read its configuration: {first_line(error)}") from None
