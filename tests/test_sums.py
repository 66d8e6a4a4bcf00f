"""Sums that are never formed: a convolution of the terms side by side gives what a convolution of the sum gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d

from yolo_prune.errors import PlanError
from yolo_prune.surgery.sums import Source, Value, added, concatenated, whole, widened


def values_of_width_one(count: int) -> list[Value]:
    return [whole(Source(number, 1)) for number in range(count)]


class TestByHand:
    def test_a_sum_repeats_the_weight(self):
        x, s = whole(Source(0, 2)), whole(Source(1, 2))
        weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert widened(weight, added([x, s])).tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]

    def test_c2f_reads_no_more_channels_than_before(self):
        """cv2 of n=2: W0 y0 + (W1 + W2 + W3) y1 + (W2 + W3) s1 + W3 s2."""
        y0, y1, s1, s2 = values_of_width_one(4)
        value = concatenated([y0, y1, added([y1, s1]), added([added([y1, s1]), s2])])
        assert widened(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), value).tolist() == [[1, 1110, 1100, 1000]]

    def test_c3_repeats_its_first_segment(self):
        t, s1, s2, u = values_of_width_one(4)
        value = concatenated([added([added([t, s1]), s2]), u])
        assert widened(torch.tensor([[5.0, 7.0]]), value).tolist() == [[5, 5, 5, 7]]

    def test_terms_that_do_not_line_up(self):
        """(a: 2, b: 1) + (c: 1, d: 2)."""
        a, b, c, d = (whole(Source(number, width)) for number, width in enumerate((2, 1, 1, 2)))
        value = added([concatenated([a, b]), concatenated([c, d])])
        assert widened(torch.tensor([[1.0, 2.0, 3.0]]), value).tolist() == [[1, 2, 3, 1, 2, 3]]

    def test_a_term_that_is_added_twice(self):
        (x,) = values_of_width_one(1)
        assert widened(torch.tensor([[3.0]]), added([x, x])).tolist() == [[6]]

    def test_what_is_no_sum_keeps_its_weight(self):
        value = concatenated(values_of_width_one(3))
        weight = torch.rand(2, 3, 3, 3)
        assert torch.equal(widened(weight, value), weight)

    def test_weights_are_added_in_fp64_and_rounded_once(self):
        """Half precision: 2048 + 1 + 1 is 2048 if every step is rounded."""
        y, s = values_of_width_one(2)
        value = concatenated([y, added([y, s]), added([y, s])])
        weight = torch.tensor([[2048.0, 1.0, 1.0]], dtype=torch.float16)
        assert widened(weight, value).tolist() == [[2050, 2]]
        assert widened(weight, value).dtype == torch.float16


class TestWholes:
    def test_of_a_concatenation(self):
        values = values_of_width_one(3)
        assert concatenated(values).wholes() == tuple(value.sources()[0] for value in values)

    def test_of_one_tensor_twice(self):
        (x,) = values_of_width_one(1)
        assert concatenated([x, x]).wholes() == x.sources() * 2

    def test_a_sum_has_none(self):
        x, s = values_of_width_one(2)
        assert added([x, s]).wholes() is None
        assert concatenated([x, added([x, s])]).wholes() is None


class TestRefused:
    def test_a_sum_of_different_widths(self):
        with pytest.raises(PlanError, match=r"\[1, 2\] channels"):
            added([whole(Source(0, 1)), whole(Source(1, 2))])

    def test_a_weight_of_another_width(self):
        with pytest.raises(PlanError, match="expected: 2 inputs"):
            widened(torch.rand(3, 4), whole(Source(0, 2)))


@st.composite
def expressions(draw) -> tuple[Value, list[int]]:
    """Draw a value from sources by sums and concatenations; also return the sources' widths."""
    widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    values = [whole(Source(number, width)) for number, width in enumerate(widths)]
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.sampled_from(values))
        fitting = [value for value in values if value.width == first.width]
        if draw(st.booleans()):
            values.append(added([first, draw(st.sampled_from(fitting))]))
        else:
            values.append(concatenated([first, draw(st.sampled_from(values))]))
    return values[-1], widths


def formed(value: Value, tensors: list[Tensor]) -> Tensor:
    """Form a value by its definition: every term is added at its place."""
    result = torch.zeros(1, value.width, 5, 5, dtype=torch.float64)
    for source, at in value.terms:
        result[:, at : at + source.width] += tensors[source.number]
    return result


@given(expressions(), st.sampled_from([1, 3]), st.integers(0, 99))
def test_reading_the_terms_is_reading_the_value(expression, size, seed):
    value, widths = expression
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, width, 5, 5, generator=generator, dtype=torch.float64) for width in widths]
    weight = torch.randn(2, value.width, size, size, generator=generator, dtype=torch.float64)
    side_by_side = torch.cat([tensors[source.number] for source in value.sources()], 1)
    expected = conv2d(formed(value, tensors), weight, padding=size // 2)
    found = conv2d(side_by_side, widened(weight, value), padding=size // 2)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11 * max(1.0, float(expected.abs().max())))


@given(expressions())
def test_wholes_are_the_value_side_by_side(expression):
    value, widths = expression
    tensors = [torch.rand(1, width, 5, 5, dtype=torch.float64) for width in widths]
    wholes = value.wholes()
    if wholes is not None:
        assert torch.equal(torch.cat([tensors[source.number] for source in wholes], 1), formed(value, tensors))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 99))
def test_concatenation_and_sum_are_what_they_are_called(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.rand(1, width, 5, 5, generator=generator, dtype=torch.float64) for width in widths]
    values = [whole(Source(number, width)) for number, width in enumerate(widths)]
    forth, back = concatenated(values), concatenated(values[::-1])
    assert torch.equal(formed(forth, tensors), torch.cat(tensors, 1))
    assert torch.equal(formed(added([forth, back]), tensors), torch.cat(tensors, 1) + torch.cat(tensors[::-1], 1))
