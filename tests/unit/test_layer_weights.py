"""Layer weights as text, numbers and curves."""

from __future__ import annotations

import pytest

from hydit_core.errors import ConfigError
from hydit_core.layer_weights import CURVES, LayerWeights


def test_the_published_decay_is_tencents_formula() -> None:
    weights = LayerWeights.parse("decay").resolve(19)
    assert weights == [1.0 * 0.825 ** float(19 - i) for i in range(19)]


@pytest.mark.parametrize(
    ("source", "count", "expected"),
    [
        ("0.5", 3, [0.5, 0.5, 0.5]),
        (0.25, 2, [0.25, 0.25]),
        ("[0.1, 0.2; 1e-1]", 3, [0.1, 0.2, 0.1]),
        ([1, 0, -2.5], 3, [1.0, 0.0, -2.5]),
        ("Linear", 4, [0.25, 0.5, 0.75, 1.0]),
        ("ease(2)", 2, [1.0, 2.0]),
        ("only-early", 3, [1.0, 1.0, 0.0]),
        ("only-late( 0.5 )", 3, [0.0, 0.0, 0.5]),
        ("uniform(0)", 1, [0.0]),
    ],
)
def test_what_can_be_written(source: object, count: int, expected: list[float]) -> None:
    weights = LayerWeights.parse(source)  # type: ignore[arg-type]
    assert weights.resolve(count) == pytest.approx(expected)
    assert LayerWeights.parse(str(weights)).resolve(count) == weights.resolve(count)


def test_text_keeps_every_digit() -> None:
    values = [0.825**i for i in range(19)]
    assert LayerWeights.parse(str(LayerWeights.parse(values))).resolve(19) == values
    assert str(LayerWeights.parse("0.50, 1.0, 1e-7")) == "0.5, 1, 1e-07"
    assert str(LayerWeights.parse("decay(0.123456789)")) == "decay(0.123456789)"


def test_a_curve_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="too large for 19 layers"):
        LayerWeights.parse("decay(1e300)").resolve(19)


def test_early_and_late_together_are_everything() -> None:
    for count in (1, 2, 13, 19):
        early, late = (LayerWeights.parse(name).resolve(count) for name in ("only-early", "only-late"))
        assert [a + b for a, b in zip(early, late, strict=True)] == [1.0] * count


@pytest.mark.parametrize(
    "text", ["", "  ", "nan", "1, inf", "decay(x)", "__import__('os')", "1, two", "bogus(1)"]
)
def test_what_cannot_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(ConfigError, match="decay"):
        LayerWeights.parse(text)


def test_a_list_of_another_length_says_how_many_are_wanted() -> None:
    with pytest.raises(ConfigError, match="3 layer weights for a ControlNet with 19 layers: give 19 numbers"):
        LayerWeights.parse("1, 2, 3").resolve(19)


def test_every_curve_is_finite_at_every_length() -> None:
    for name in CURVES:
        assert len(LayerWeights.parse(name).resolve(1)) == 1
