"""Filters of any order that may grow on the way: stacks, and the way back, against the dense map that they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explaind_core import LinearFilter
from explaind_core.operators import Diagonal, Left, Scalar, apply_each

SIZE = 2


def tensor(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


#: Few, so that what is read out is often the same as what is remembered, or the same but for one coefficient.
COEFFICIENTS = [
    0.0,
    1.0,
    0.5,
    Diagonal(tensor(1, SIZE)),
    Left(tensor(2, SIZE, SIZE)),
    Scalar(0.5) @ Left(tensor(3, SIZE, SIZE)),
]


@st.composite
def growing(draw):
    """Filters one after the other, each of at least as many states as the one before."""
    orders = sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    one = st.sampled_from(COEFFICIENTS)

    def made(k):
        row = st.lists(one, min_size=k, max_size=k)
        A, B = draw(st.lists(row, min_size=k, max_size=k)), draw(row)
        C, D = draw(row), draw(one)
        if k and draw(st.booleans()):  # what is remembered is read out as it is, but perhaps for one coefficient
            C, D = A[0], draw(st.sampled_from([B[0], D]))
        return LinearFilter(A=A, B=B, C=C, D=D)

    return [made(k) for k in orders]


def grown(state, order, like):
    return (*state, *(torch.zeros_like(like) for _ in range(order - len(state))))


def forth(sequence, inputs):
    """What is read out at every step, by `advance`: a state that appears starts at zero."""
    state, outs = (), []
    for current, u in zip(sequence, inputs, strict=True):
        out, state = current.advance(grown(state, current.order, u), u)
        outs.append(out)
    return outs, state


def dense(sequence):
    """The matrix of the map from all inputs to all that is read out, by unit vectors: ``[N SIZE, N SIZE]``."""
    n = len(sequence) * SIZE
    columns = [forth(sequence, column.view(-1, SIZE))[0] for column in torch.eye(n, dtype=torch.float64)]
    return torch.stack([torch.cat(outs) for outs in columns], 1)


@settings(deadline=None, max_examples=60)
@given(growing())
def test_a_stack_is_advanced_as_each_of_its_tensors(sequence):
    inputs = tensor(7, len(sequence), 3, SIZE)
    expected = [forth(sequence, list(inputs[:, r])) for r in range(3)]
    state, unread = (), ()
    for s, (current, u) in enumerate(zip(sequence, inputs, strict=True)):
        silent, unread = current.advance_each(grown(unread, current.order, u), u, read=False)
        out, state = current.advance_each(grown(state, current.order, u), u)
        assert silent is None
        torch.testing.assert_close(out, torch.stack([outs[s] for outs, _ in expected]), rtol=1e-12, atol=1e-12)
    for j, (found, same) in enumerate(zip(state, unread, strict=True)):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, torch.stack([after[j] for _, after in expected]), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(growing(), st.data())
def test_the_way_back_is_the_transpose_of_the_way_there(sequence, data):
    """Also where states appear on the way, of which nothing is asked before, and where nothing is asked of a step."""
    matrix = dense(sequence)
    asked = tensor(8, len(sequence), 3, SIZE)
    silent = data.draw(st.lists(st.booleans(), min_size=len(sequence), max_size=len(sequence)), label="nothing asked")
    asked[torch.tensor(silent)] = 0
    z, found = (), []
    for current, psi, nothing in reversed(list(zip(sequence, asked, silent, strict=True))):
        z = grown(z, current.order, psi)
        u, z = current.adjoint(z, None if nothing and z else psi)
        assert len(z) == current.order
        found.append(u)
    expected = (asked.permute(1, 0, 2).reshape(3, -1) @ matrix).view(3, len(sequence), SIZE).permute(1, 0, 2)
    torch.testing.assert_close(torch.stack(found[::-1]), expected, rtol=1e-11, atol=1e-11)


def test_what_is_read_out_anew_is_no_average_that_is_read_out_as_it_is():
    """C is the row of A, and D is not B: the new state is not what is read out."""
    made = LinearFilter(A=((0.5,),), B=(1.0,), C=(0.5,), D=3.0)
    out, (state,) = made.advance_each((torch.ones(1, 1),), torch.ones(1, 1))
    assert (out.item(), state.item()) == (3.5, 1.5)


def test_the_way_back_asks_the_first_states_where_a_state_appears_later():
    later = (torch.full((1, 1), 2.0), torch.full((1, 1), 5.0))
    u, before = LinearFilter(A=((1.0,),), B=(1.0,), C=(0.0,), D=0.0).adjoint(later, None)
    assert (u.item(), [z.item() for z in before]) == (2.0, [2.0])


@pytest.mark.parametrize("largest", [1e38, 1e40])  # within float32, and beyond it
def test_weights_beyond_the_precision_of_a_stack_are_multiplied_in_float64(largest):
    weight = torch.tensor([largest, 2.0], dtype=torch.float64)
    found = apply_each(Diagonal(weight), torch.tensor([[1e-10, 1.0], [0.0, 3.0]]))
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([1e-10 * largest, 2.0, 0.0, 6.0], rel=1e-6)


def test_a_buffer_is_dampened_unless_it_is_just_being_created():
    assert LinearFilter.momentum(0.9, dampening=0.25) == LinearFilter(A=((0.9,),), B=(0.75,), C=(0.9,), D=0.75)
    assert LinearFilter.momentum(0.9, dampening=0.25, first=True) == LinearFilter.momentum(0.9)
