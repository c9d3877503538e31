"""The only place where text becomes token ids: chat template, plain text, the end-of-response token.

Tokenizers are transformers' own; only fast ones (a `tokenizer.json`) are accepted, because a slow one has no exact
description to compare with another's.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gftdata.errors import UserError, first_line
from gftdata.template_trial import check_template
from gftdata.types import Message, TokenIds

VOCABULARY = "tokenizer.json"
SPACES = ("\u2581", "\u0120")  # how sentencepiece and byte-level BPE write a space
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how sentencepiece writes one
_PROBE = "GFTPROBE"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")  # what weights that are pickles are called
HARMLESS = ("training_args.bin",)  # beside the weights, and never read


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A transformers tokenizer with what the toolkit derives from it once."""

    backend: Any  # transformers.PreTrainedTokenizerFast
    end_id: int  # closes a response: see `find_end_id`
    stop_ids: tuple[int, ...]  # every id that ends a sampled response
    hash: str  # what text becomes which ids: vocabulary, merges, normalisation, special tokens
    template_hash: str  # the chat template's text, or that of "" where there is none


def load_tokenizer(model: str) -> Tokenizer:
    """Load the tokenizer of a local folder or Hub model. Raises UserError where there is none to be had."""
    from transformers import AutoTokenizer, GenerationConfig

    check_model_path(model)
    try:
        backend = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what a library makes of damaged or hostile files: anything
        raise UserError(f"{model}: cannot load its tokenizer: {first_line(error)[:300]}") from None
    if not getattr(backend, "is_fast", False):
        raise UserError(f"{model}: its tokenizer has no fast version (tokenizer.json), which is needed here")
    if not isinstance(template := backend.chat_template or "", str):
        raise UserError(f"{model}: has several chat templates, expected one; leave the one to be used in its tokenizer")
    if template and (refused := check_template(template)):
        raise UserError(f"{model}: its chat template is refused: {refused}")
    end_id = find_end_id(backend, model)
    stop_ids = {end_id}
    if backend.eos_token_id is not None:
        stop_ids.add(backend.eos_token_id)
    try:
        declared = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a model without generation_config.json declares nothing
        declared = None
    except Exception as error:
        raise UserError(f"{model}: cannot read its generation_config.json: {first_line(error)[:300]}") from None
    stop_ids.update(declared if isinstance(declared, list) else [] if declared is None else [declared])
    return Tokenizer(backend, end_id, tuple(sorted(stop_ids)), tokenizer_hash(backend), template_hash(backend))


def check_model_path(model: str) -> None:
    """Refuse what can only be a mistyped path before a library turns it into a question to the Hub."""
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"{model}: not a model folder: it has no config.json")
        check_weights(Path(model))
    elif looks_local or Path(model).exists():
        raise UserError(f"{model}: no such model folder")


def check_weights(folder: Path) -> None:
    """Refuse a model folder whose weights are pickles: to load one is to run what its author wrote."""
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind) if path.name not in HARMLESS)
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder / pickles[0]}: weights as a pickle, which may run code when it is loaded; only safetensors are "
            "loaded here: take the model's safetensors, or convert it where you trust it (load it in transformers and "
            "save_pretrained it)"
        )


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenIds:
    """Messages -> ids [P], generation prompt included.

    With a chat template, that; without one a single user message is plain text, and anything more is refused.
    """
    backend = tokenizer.backend
    if backend.chat_template:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = backend.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # jinja2 raises what the template's author chose
            raise UserError(
                f"the chat template refuses a prompt of roles {[m.role for m in messages]}: {first_line(error)}"
            ) from None
    elif len(messages) == 1:
        ids = backend(messages[0].content)["input_ids"]
    else:
        raise UserError(
            f"the tokenizer has no chat template, so a prompt must be one message, found {len(messages)}; "
            "use a model with a template, or prompts without a system message"
        )
    if len(ids) == 0:
        raise UserError("a prompt is empty after tokenisation")
    return np.asarray(ids, dtype=np.int32)


def encode_response(tokenizer: Tokenizer, text: str, *, ended: bool) -> TokenIds:
    """Response text -> ids [T]; `ended` appends the end-of-response token.

    Special tokens that occur in the text are encoded as the text they are: a response must not be able to end itself.
    """
    ids = tokenizer.backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return np.asarray([*ids, tokenizer.end_id] if ended else ids, dtype=np.int32)


def decode_response(tokenizer: Tokenizer, response_ids: TokenIds) -> str:
    """Sampled ids [T] -> text, without the tokens that end a response."""
    text: str = tokenizer.backend.decode(response_ids, skip_special_tokens=True)
    return text


def next_token_inputs(prompt_ids: TokenIds, response_ids: TokenIds) -> tuple[TokenIds, int]:
    """The shift by one: what goes into a model so that it predicts a response, and from where on it does.

    Returns inputs [P+T-1] = (prompt + response) without the last token, and first = P-1: the logits at inputs
    position first + t are those of response token t.
    """
    return np.concatenate([prompt_ids, response_ids])[:-1], len(prompt_ids) - 1


def load_vocabulary(model: str) -> Any:
    """What turns a model's ids into text, a `tokenizers.Tokenizer`: for reading where there is no torch.

    Raises UserError where there is none to be had.
    """
    import tokenizers

    check_model_path(model)
    path = Path(model) / VOCABULARY
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        from gftdata.hub import failures

        try:
            path = Path(hf_hub_download(model, VOCABULARY))
        except failures() as error:
            raise UserError(f"{model}: the Hub has not given its {VOCABULARY}: {first_line(error)}") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise UserError(f"{path}: cannot be read as a tokenizer: {first_line(error)}") from None


def token_texts(vocabulary: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token by itself, special tokens included; bytes that are no character alone as `<0xe4 0xbd>`.

    An id that the vocabulary lacks is `<id 99999>`. Some decoders drop a space at the beginning: it is put back.
    """
    return {token_id: _token_text(vocabulary, token_id) for token_id in ids}


def _token_text(vocabulary: Any, token_id: int) -> str:
    piece: str | None = vocabulary.id_to_token(token_id) if token_id >= 0 else None
    if piece is None:
        return f"<id {token_id}>"
    text: str = vocabulary.decode([token_id], skip_special_tokens=False)
    if text and "\ufffd" not in text:
        return " " + text if piece.startswith(SPACES) and not text.startswith(" ") else text
    if BYTE.fullmatch(piece):
        return piece.lower()
    if all(character in _BYTES for character in piece):
        return f"<0x{' '.join(f'{_BYTES[character]:02x}' for character in piece)}>"
    return piece.replace("\u2581", " ")


def _byte_alphabet() -> dict[str, int]:
    """What byte-level BPE writes bytes as (GPT-2's table): printable ones as themselves, others as 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def find_end_id(backend: Any, model: str) -> int:
    """The token that ends an assistant's turn: what the chat template writes after it, else the EOS token.

    The two often differ: ChatML ends a turn with `<|im_end|>` while `eos_token` may be `<|endoftext|>`.
    """
    if backend.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered = backend.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # jinja2 raises what the template's author chose
            raise UserError(f"{model}: its chat template fails: {first_line(error)[:300]}") from None
        tail = rendered.rpartition(_PROBE)[2]
        tail_ids = backend(tail, add_special_tokens=False)["input_ids"] if tail else []
        if tail_ids and tail_ids[0] in backend.added_tokens_decoder:
            return int(tail_ids[0])
    if backend.eos_token_id is None:
        raise UserError(f"{model}: neither its chat template nor an eos_token says how a response ends")
    return int(backend.eos_token_id)


def tokenizer_hash(backend: Any) -> str:
    """sha256 of what the tokenizer does, independent of file layout, padding and truncation settings."""
    description = json.loads(backend.backend_tokenizer.to_str())
    for setting in ("padding", "truncation", "version"):
        description.pop(setting, None)
    return _sha256(json.dumps(description, sort_keys=True, ensure_ascii=False))


def template_hash(backend: Any) -> str:
    """sha256 of the chat template."""
    return _sha256(backend.chat_template or "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


NO_TEMPLATE_HASH = _sha256("")
