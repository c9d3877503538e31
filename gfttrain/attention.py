"""Attention over packed groups: the responses of a group share its prompt, which is computed once.

A packed row holds pieces one after the other, each a prompt and then its responses:

    prompt a | response a1 | response a2 | prompt b | response b1 | ...

A response sees its prompt and itself, causally; positions go on after the prompt. `visible` says this as a mask and is
the definition; FlexAttention (CUDA) and flash attention in parts (CPU) compute the same without building it. All three
hang in transformers' attention interface under NAME, so no model is forked; without segments NAME is plain causal
attention.

Shapes: L positions of the packed row, H query heads, K key-value heads, G query heads of each of them, D head size, B
segments of a batch of like ones, T positions of a segment, S keys.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gftdata.errors import UserError

NAME = "gft_shared_prefix"
CALL_OVERHEAD = 128 * 128  # score elements that are computed in the time a call of the kernel costs
SMALLEST_FLEX_HEAD = 16
PROMPT = -1  # the response number of a prompt's positions

Ints = npt.NDArray[np.int64]
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where prompts and responses lie in a packed row. Responses follow their prompt without a gap."""

    prompt_starts: Ints  # of each piece
    prompt_lengths: Ints
    response_starts: Ints  # of each response, of all pieces
    response_lengths: Ints  # positions: one less than its tokens, so it may be 0
    piece_of_response: Ints
    piece_L: torch.Tensor
    response_L: torch.Tensor  # PROMPT, or the number of the response in the row
    position_L: torch.Tensor
    built: dict[Any, Any] = field(default_factory=dict)  # what the backends derive from it, once a row

    def to(self, device: torch.device) -> "Segments":
        piece, response, position = (moved(t, device) for t in (self.piece_L, self.response_L, self.position_L))
        return replace(self, piece_L=piece, response_L=response, position_L=position, built={})

    def span(self) -> int:
        """The longest prompt with a response: a sliding window that is wider changes nothing."""
        ends = self.prompt_lengths[self.piece_of_response] + self.response_lengths
        return int(max(self.prompt_lengths.max(initial=0), ends.max(initial=0)))


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without the host waiting for it: which takes pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def visible(segments: Segments, window: int | None = None) -> torch.Tensor:
    """The definition: which position (row) sees which (column), bool [L, L]. `window` is a sliding window's width."""
    order = torch.arange(len(segments.position_L), device=segments.position_L.device)
    return _sees(segments, window)(None, None, order[:, None], order[None, :])


def _sees(segments: Segments, window: int | None) -> Callable[..., torch.Tensor]:
    piece_L, response_L, position_L = segments.piece_L, segments.response_L, segments.position_L

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = (piece_L[query] == piece_L[key]) & (key <= query)
        same = same & ((response_L[key] == PROMPT) | (response_L[key] == response_L[query]))
        return same if window is None else same & (position_L[query] - position_L[key] < window)

    return sees


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D]."""
    if segments is None:
        if softcap is not None:
            return _softcapped(query, key, value, attention_mask, scaling, softcap), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if kwargs.get("s_aux") is not None:
        raise UserError(
            f"{type(module).__name__} takes attention sinks, which packed rows do not have; set batch.layout=padded"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # positions are applied in float32, so queries come wider
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.shape[-1] >= SMALLEST_FLEX_HEAD:
        out = _flex(query, key, value, segments, sliding_window, scale, softcap)
        return out.transpose(1, 2), None
    if sliding_window is not None and sliding_window >= segments.span():
        sliding_window = None
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        out = _in_parts(query, key, value, segments, sliding_window, scale)
    else:
        out = _masked(query, key, value, segments, sliding_window, scale, softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """With the mask built: for devices and models that the other two do not serve. Returns [1, H, L, D]."""
    mask_LL = segments.built.get(("mask", window))
    if mask_LL is None:
        mask_LL = segments.built[("mask", window)] = visible(segments, window)
    if softcap is not None:
        return _softcapped(query, key, value, mask_LL, scale, softcap).transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_LL, scale=scale)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap * tanh(q k / softcap)) v, which no fused kernel on a CPU computes. Returns [1, L, H, D]."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ repeat_kv(key, groups).transpose(2, 3)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        length = scores.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        # not -inf: a padded query may see nothing at all, and its NaN would reach the next layer's keys
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    out: torch.Tensor = scores.softmax(-1) @ repeat_kv(value, groups)
    return out.transpose(1, 2)


# ---- CUDA


@cache
def _compiled_flex() -> tuple[Any, Any]:
    """Compiled once for all lengths."""
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def build_masks(segments: Segments, windows: Iterable[int | None], softcap: float | None) -> None:
    """What FlexAttention needs of a row, made before its layers run: in them it would break compiled graphs."""
    for window in windows:
        real = None if window is not None and window >= segments.span() else window
        segments.built["blocks", window] = _block_mask(segments, real)
    if softcap is not None:
        _cap(segments, softcap)


def _block_mask(segments: Segments, window: int | None) -> BlockMask:
    mask: BlockMask | None = segments.built.get(("blocks", window))
    if mask is None:
        length, device = len(segments.position_L), segments.position_L.device
        make = _compiled_flex()[1] if device.type == "cuda" else create_block_mask
        mask = segments.built["blocks", window] = make(
            _sees(segments, window), None, None, length, length, device=device
        )
    return mask


def _cap(segments: Segments, softcap: float) -> torch.Tensor:
    """As a tensor: a float would become a symbol of the compiled graph, which FlexAttention does not take."""
    cap: torch.Tensor | None = segments.built.get("cap")
    if cap is None:
        cap = segments.built["cap"] = torch.tensor(softcap, device=segments.position_L.device)
    return cap


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention (arXiv:2412.05496): blocks of the mask that nothing sees are skipped. Returns [1, H, L, D]."""
    # within a compiled layer it is compiled with the layer
    eager = torch.compiler.is_compiling() or not query.is_cuda
    attention: Any = flex_attention if eager else _compiled_flex()[0]
    score = None
    if softcap is not None:
        cap = _cap(segments, softcap)

        def score(score: torch.Tensor, *_: Any) -> torch.Tensor:
            return cap * torch.tanh(score / cap)

    grouped = query.shape[1] != key.shape[1]
    mask = _block_mask(segments, window)
    out: torch.Tensor = attention(query, key, value, score_mod=score, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out


# ---- CPU


@dataclass(frozen=True, slots=True)
class Part:
    """Queries of B segments of like length looking at the keys of as many: one call of the kernel.

    The kernel's batch is segments times key-value heads, and its heads are the G query heads that share one, so that
    keys and values need no copy for each query head. A place is a position and a key-value head: position * K + head.
    """

    queries: torch.Tensor | slice  # places [B * K, T]; of one segment, a slice of positions
    keys: torch.Tensor | slice  # places [B * K, S], or such a slice
    real: torch.Tensor | None  # which of the B * K * T queries are not padded, where some are
    padded: torch.Tensor | None  # which are
    across: bool  # responses with their prompt, after each has been with itself
    causal: bool
    mask: torch.Tensor | None  # additive [B * K, 1, T, S], for a sliding window


@torch.compiler.disable  # type: ignore[untyped-decorator]  # parts differ from batch to batch
def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Flash attention on the parts of the mask that are not empty. Returns [1, H, L, D].

    Three kinds of parts: prompts with themselves, responses with themselves, responses with their prompt. The last two
    are merged by their log-sum-exps, as blocks are within flash attention (arXiv:2205.14135) and ring attention.
    """
    name = ("parts", window, query.dtype, key.shape[1])
    plan = segments.built.get(name)
    if plan is None:
        plan = segments.built[name] = _plan_parts(segments, window, query.dtype, key.shape[1])
    out: torch.Tensor = _PartsAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return out


def _plan_parts(segments: Segments, window: int | None, dtype: torch.dtype, kv_heads: int) -> tuple[Part, ...]:
    """First the parts of which every position is a query and a key of one, then responses' positions once more."""

    def part(queries: tuple[Ints, Ints], keys: tuple[Ints, Ints], chosen: Ints, across: bool) -> Part:
        (query_starts, query_lengths), (key_starts, key_lengths) = queries, keys
        return _part(
            query_starts[chosen],
            query_lengths[chosen],
            key_starts[chosen],
            key_lengths[chosen],
            across,
            window,
            segments.position_L.numpy(),
            dtype,
            kv_heads,
        )

    starts = np.concatenate([segments.prompt_starts, segments.response_starts])
    lengths = np.concatenate([segments.prompt_lengths, segments.response_lengths])
    own = starts, lengths
    prompts = segments.prompt_starts, segments.prompt_lengths
    # all responses of a piece look at its prompt together: to the prompt they are one segment
    pieces = len(segments.prompt_starts)
    first = segments.prompt_starts + segments.prompt_lengths
    after = np.bincount(segments.piece_of_response, segments.response_lengths, minlength=pieces).astype(np.int64)
    within = [part(own, own, chosen, False) for chosen in _alike(lengths, lengths)]
    across = [
        part((first, after), prompts, chosen, True)
        for length in np.unique(segments.prompt_lengths)
        for chosen in _alike(np.where(segments.prompt_lengths == length, after, 0), np.full(pieces, length))
    ]
    return (*within, *across)


def _alike(lengths: Ints, widths: Ints) -> Iterator[Ints]:
    """Segments that go into one call: the longest first, others while padding them costs less than another call."""
    chosen: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        if lengths[number] == 0:
            break
        if chosen:
            width = max(int(widths[chosen[0]]), int(widths[number]))
            if (lengths[chosen[0]] - lengths[number]) * width > CALL_OVERHEAD:
                yield np.array(chosen)
                chosen = []
        chosen.append(number)
    if chosen:
        yield np.array(chosen)


def _part(
    query_starts: Ints,
    query_lengths: Ints,
    key_starts: Ints,
    key_lengths: Ints,
    across: bool,
    window: int | None,
    position_L: Ints,
    dtype: torch.dtype,
    kv_heads: int,
) -> Part:
    count, num_queries, num_keys = len(query_starts), int(query_lengths.max()), int(key_lengths.max())
    causal, mask = not across, None
    # a padded place repeats its segment's last position; its outputs are dropped and its gradients zero
    places_BT = query_starts[:, None] + np.minimum(np.arange(num_queries), query_lengths[:, None] - 1)
    keys_BS = key_starts[:, None] + np.minimum(np.arange(num_keys), key_lengths[:, None] - 1)
    if window is not None:
        far_BTS = position_L[places_BT][:, :, None] - position_L[keys_BS][:, None, :] >= window
        if far_BTS.any():
            if causal:
                far_BTS |= np.arange(num_queries)[:, None] < np.arange(num_keys)
                causal = False
            mask = torch.zeros(count, 1, num_queries, num_keys, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(far_BTS[:, None]), -torch.inf)
            mask = mask.repeat_interleave(kv_heads, 0)
    if count == 1:
        first, other = int(query_starts[0]), int(key_starts[0])
        places = slice(first, first + num_queries), slice(other, other + num_keys)
        return Part(*places, None, None, across, causal, mask)

    def by_head(positions_BT: Ints) -> torch.Tensor:
        places_BKT = positions_BT[:, None] * kv_heads + np.arange(kv_heads)[:, None]
        return torch.from_numpy(places_BKT.reshape(count * kv_heads, -1))

    real_N = torch.from_numpy((np.arange(num_queries) < query_lengths[:, None]).repeat(kv_heads, 0).reshape(-1))
    full = bool(real_N.all())
    return Part(
        by_head(places_BT),
        by_head(keys_BS),
        None if full else real_N.nonzero().flatten(),
        None if full else (~real_N).nonzero().flatten(),
        across,
        causal,
        mask,
    )


class _PartsAttention(torch.autograd.Function):
    """query [1, H, L, D], key and value [1, K, L, D] -> [1, H, L, D].

    The backward pass of each part takes the merged output and log-sum-exp: with them, the kernel's own formula gives
    the part's share of the gradient of the whole softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: tuple[Part, ...], scale: float
    ) -> torch.Tensor:
        q_LKGD, k_LK1D, v_LK1D = (_by_position(t, key.shape[1]) for t in (query, key, value))
        out_LKGD = torch.empty_like(q_LKGD)
        lse_LKG1 = q_LKGD.new_empty(*q_LKGD.shape[:3], 1, dtype=torch.promote_types(query.dtype, torch.float32))
        for part in plan:
            q, k, v = _operands(part, q_LKGD, k_LK1D, v_LK1D)
            out, lse = flash(q, k, v, 0.0, part.causal, attn_mask=part.mask, scale=scale)
            if part.mask is not None:  # the kernel says 0 where a query sees no key at all
                lse = lse.masked_fill((part.mask == -torch.inf).all(-1), -torch.inf)
            lse = lse[..., None]
            if part.across:
                own, own_lse = _take(out_LKGD, part.queries), _take(lse_LKG1, part.queries)
                share = torch.sigmoid(lse - own_lse)
                out = torch.lerp(own.to(share.dtype), out.to(share.dtype), share).to(out.dtype)
                lse = torch.logaddexp(own_lse, lse)
            _put(out_LKGD, part.queries, part.real, out)
            _put(lse_LKG1, part.queries, part.real, lse)
        ctx.save_for_backward(query, key, value, out_LKGD, lse_LKG1)
        ctx.plan, ctx.scale = plan, scale
        return out_LKGD.flatten(1, 2).transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out_LKGD, lse_LKG1 = ctx.saved_tensors
        plan: tuple[Part, ...] = ctx.plan
        q_LKGD, k_LK1D, v_LK1D, grad_LKGD = (_by_position(t, key.shape[1]) for t in (query, key, value, grads[0]))
        dq_LKGD, dk_LK1D, dv_LK1D = (torch.empty_like(t) for t in (q_LKGD, k_LK1D, v_LK1D))
        for part in plan:
            grad = _take(grad_LKGD, part.queries)
            if part.padded is not None:
                grad.transpose(1, 2).flatten(0, 1).index_fill_(0, part.padded, 0.0)
            dq, dk, dv = flash_backward(
                grad,
                *_operands(part, q_LKGD, k_LK1D, v_LK1D),
                _take(out_LKGD, part.queries),
                _take(lse_LKG1, part.queries)[..., 0],
                0.0,
                part.causal,
                attn_mask=part.mask,
                scale=ctx.scale,
            )
            dk, dv = dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)
            for places, target, rows in (
                (part.queries, dq_LKGD, dq),
                (part.keys, dk_LK1D, dk),
                (part.keys, dv_LK1D, dv),
            ):
                if part.across:
                    _add(target, places, rows)
                else:
                    _put(target, places, part.real, rows)
        return (*(t.flatten(1, 2).transpose(0, 1)[None] for t in (dq_LKGD, dk_LK1D, dv_LK1D)), None, None)


def _by_position(heads: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[1, H, L, D] -> [L, K, G, D], contiguous."""
    rows: torch.Tensor = heads[0].transpose(0, 1).unflatten(1, (kv_heads, -1))
    return rows.contiguous()


def _operands(
    part: Part, q_LKGD: torch.Tensor, k_LK1D: torch.Tensor, v_LK1D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's: [B * K, G, T, D] and twice [B * K, G, S, D]."""
    shape = (-1, q_LKGD.shape[2], -1, -1)
    return (
        _take(q_LKGD, part.queries),
        _take(k_LK1D, part.keys).expand(shape),
        _take(v_LK1D, part.keys).expand(shape),
    )


def _take(rows_LKGD: torch.Tensor, places: torch.Tensor | slice) -> torch.Tensor:
    """[B * K, G, T, D] of these places: a view of a slice, else a copy."""
    if isinstance(places, slice):
        return rows_LKGD[places].permute(1, 2, 0, 3)
    taken: torch.Tensor = rows_LKGD.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)
    return taken.transpose(1, 2)


def _put(
    target_LKGD: torch.Tensor, places: torch.Tensor | slice, real: torch.Tensor | None, part: torch.Tensor
) -> None:
    """Write what is not padding of [B * K, G, T, D] to its places."""
    if isinstance(places, slice):
        target_LKGD[places] = part.permute(2, 0, 1, 3)
        return
    places, rows = places.flatten(), part.transpose(1, 2).flatten(0, 1)
    if real is not None:
        places, rows = places[real], rows[real]
    target_LKGD.flatten(0, 1).index_copy_(0, places, rows)


def _add(target_LKGD: torch.Tensor, places: torch.Tensor | slice, part: torch.Tensor) -> None:
    if isinstance(places, slice):
        target_LKGD[places] += part.permute(2, 0, 1, 3)
    else:  # a padded place adds zero to the position that it repeats
        target_LKGD.flatten(0, 1).index_add_(0, places.flatten(), part.transpose(1, 2).flatten(0, 1))


def make_segments(prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]]) -> Segments:
    """Segments of a packed row, from the positions that each piece's prompt and responses take."""
    prompts = np.array(prompt_lengths, np.int64)
    piece_of_response = np.repeat(np.arange(len(prompts)), [len(lengths) for lengths in response_lengths])
    flat = np.array([length for lengths in response_lengths for length in lengths], np.int64)
    kinds, lengths, pieces, offsets = [], [], [], []
    number = 0
    for piece, (prompt, inside) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        kinds += [PROMPT, *range(number, number + len(inside))]
        lengths += [prompt, *inside]
        pieces += [piece] * (1 + len(inside))
        offsets += [0] + [prompt] * len(inside)
        number += len(inside)
    sizes = np.array(lengths, np.int64)
    ends = sizes.cumsum()
    starts = ends - sizes
    kind = np.array(kinds, np.int64)
    position = np.arange(int(sizes.sum())) + np.repeat(np.array(offsets, np.int64) - starts, sizes)
    return Segments(
        prompt_starts=starts[kind == PROMPT],
        prompt_lengths=prompts,
        response_starts=starts[kind != PROMPT],
        response_lengths=flat,
        piece_of_response=piece_of_response,
        piece_L=torch.from_numpy(np.repeat(pieces, sizes)),
        response_L=torch.from_numpy(np.repeat(kind, sizes)),
        position_L=torch.from_numpy(position),
    )
