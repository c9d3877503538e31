"""Attention over packed groups: three ways to compute it, one definition."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import distance

from gftdata.errors import UserError
from gfttrain.attention import (
    Segments,
    _flex,
    _in_parts,
    _masked,
    _plan_parts,
    attend,
    build_masks,
    make_segments,
    visible,
)

SHAPES = [
    ([7, 7, 3, 12, 1], [[3, 4, 0, 9], [2, 30], [1], [5, 5, 5], [0, 2]]),
    ([5], [[0]]),
    ([1], [[40]]),
    ([4, 90], [[200, 3, 150], [7]]),  # too unlike for one call of the kernel
]
WINDOWS = [None, 5, 1, 10**6]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(segments: Segments, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    length = len(segments.position_L)

    def draw(count: int) -> torch.Tensor:
        # as transformers gives it: position-major, heads transposed out
        drawn = torch.randn(1, length, count, 8, dtype=torch.float64, generator=generator).to(dtype)
        return drawn.transpose(1, 2).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


def by_hand(prompts: list[int], responses: list[list[int]], window: int | None) -> np.ndarray:
    """What sees what, token by token, from words: its own prompt and its own response, not what comes after."""
    tokens = []  # (piece, response or None, position)
    for piece, (prompt, lengths) in enumerate(zip(prompts, responses, strict=True)):
        tokens += [(piece, None, position) for position in range(prompt)]
        for number, length in enumerate(lengths):
            tokens += [(piece, number, prompt + position) for position in range(length)]
    seen = np.zeros((len(tokens), len(tokens)), bool)
    for q, (piece, response, position) in enumerate(tokens):
        for k, (other, their, place) in enumerate(tokens):
            near = place <= position and (window is None or position - place < window)
            seen[q, k] = piece == other and their in (None, response) and near
    return seen


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("prompts", "responses"), SHAPES)
def test_the_mask_is_what_the_words_say(prompts: list[int], responses: list[list[int]], window: int | None) -> None:
    segments = make_segments(prompts, responses)
    assert visible(segments, window).numpy().tolist() == by_hand(prompts, responses, window).tolist()


def test_positions_go_on_after_the_prompt() -> None:
    segments = make_segments([3, 2], [[2, 0, 1], [3]])
    assert segments.position_L.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4]
    assert segments.piece_L.tolist() == [0] * 6 + [1] * 5
    assert segments.response_L.tolist() == [-1, -1, -1, 0, 0, 2, -1, -1, 3, 3, 3]
    assert segments.prompt_starts.tolist() == [0, 6] and segments.response_starts.tolist() == [3, 5, 5, 8]
    assert segments.span() == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("prompts", "responses"), SHAPES)
def test_in_parts_equals_the_mask_forward_and_backward(
    prompts: list[int], responses: list[list[int]], window: int | None, dtype: torch.dtype
) -> None:
    segments = make_segments(prompts, responses)
    tensors = inputs(segments, dtype)
    weights = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for out in (
        _masked(*tensors, segments, window, 0.3, None),
        _in_parts(*tensors, segments, window, 0.3),
    ):
        results.append((out, *torch.autograd.grad(out, tensors, weights)))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * (1 + float(expected.detach().abs().max())))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    st.none() | st.integers(1, 50),
)
def test_in_parts_equals_the_mask_for_any_shape(pieces: list[tuple[int, list[int]]], window: int | None) -> None:
    segments = make_segments([prompt for prompt, _ in pieces], [lengths for _, lengths in pieces])
    tensors = inputs(segments, torch.float64, heads=2, kv_heads=1)
    results = []
    for out in (_masked(*tensors, segments, window, 0.3, None), _in_parts(*tensors, segments, window, 0.3)):
        results.append(torch.cat([t.flatten() for t in (out, *torch.autograd.grad(out.square().sum(), tensors))]))
    assert distance(results[1], results[0]) < 1e-11


def test_segments_of_like_length_share_a_call_of_the_kernel() -> None:
    segments = make_segments([10] * 50, [[12, 11, 13]] * 50)
    plan = _plan_parts(segments, None, torch.float32, 2)
    assert [part.across for part in plan] == [False, True]
    unlike = _plan_parts(make_segments([512], [[64, 400, 600]]), None, torch.float32, 2)
    assert [part.across for part in unlike] == [False] * 4 + [True]
    assert all(isinstance(part.queries, slice) and isinstance(part.keys, slice) for part in unlike)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("prompts", "responses"), SHAPES)
@torch.no_grad()
def test_flex_attention_equals_the_mask(
    prompts: list[int], responses: list[list[int]], window: int | None, softcap: float | None
) -> None:
    # FlexAttention has no backward pass on a CPU: what is ours, the mask and the cap, shows in the forward pass
    segments = make_segments(prompts, responses)
    query, key, value = (t.detach() for t in inputs(segments, torch.float64))
    found = _flex(query, key, value, segments, window, 0.3, softcap)
    expected = _masked(query, key, value, segments, window, 0.3, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_masks_made_before_the_layers_are_those_that_the_layers_ask_for() -> None:
    segments = make_segments(*SHAPES[0])
    build_masks(segments, {None, 5, 10**6}, 1.5)
    made = dict(segments.built)
    assert made["blocks", 10**6] is made["blocks", None] and made["blocks", 5] is not made["blocks", None]
    for window in (None, 5, 10**6):
        query, key, value = (t.detach() for t in inputs(segments, torch.float32))
        _flex(query, key, value, segments, window, 0.3, 1.5)
    assert segments.built.keys() == made.keys()


def test_attention_sinks_are_refused_by_name() -> None:
    segments = make_segments([3], [[2]])
    query, key, value = inputs(segments, torch.float32)
    with pytest.raises(UserError, match=r"Linear takes attention sinks.*batch\.layout=padded"):
        attend(torch.nn.Linear(1, 1), query, key, value, None, segments=segments, s_aux=torch.zeros(6))


@pytest.mark.parametrize("compute", [_in_parts, lambda *a: _masked(*a, None)])
def test_another_response_changes_nothing(compute: Callable[..., torch.Tensor]) -> None:
    segments = make_segments([6], [[5, 4, 7]])
    query, key, value = (t.detach() for t in inputs(segments, torch.float64))
    before = compute(query, key, value, segments, None, 0.3)
    key[:, :, 11:15] = 99.0  # the second response's keys and values
    value[:, :, 11:15] = -99.0
    after = compute(query, key, value, segments, None, 0.3)
    untouched = [*range(11), *range(15, 22)]
    assert torch.equal(before[:, :, untouched], after[:, :, untouched])
    assert not torch.equal(before[:, :, 11:15], after[:, :, 11:15])
