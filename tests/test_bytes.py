"""Sizes as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfast._bytes import GIB, KIB, MIB, TIB, format_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (KIB - 1, "1023 B"),
        (KIB, "1.00 KiB"),
        (MIB - 1, "1.00 MiB"),
        (10 * MIB, "10.0 MiB"),
        (1023 * MIB, "1023 MiB"),
        (GIB - MIB // 4, "1.00 GiB"),
        (139 * GIB, "139 GiB"),
        (3 * TIB, "3.00 TiB"),
        (-3 * KIB // 2, "-1.50 KiB"),
    ],
)
def test_sizes_have_three_digits_and_a_binary_unit(n_bytes: int, text: str) -> None:
    """A size is written with three significant digits in the largest unit that fits."""
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=0, max_value=2**60))
def test_text_is_within_half_a_percent(n_bytes: int) -> None:
    """What is printed is within 0.5 % of the size, and never shows 1024 of a unit."""
    number, unit = format_bytes(n_bytes).split()
    factor = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}[unit]
    assert abs(float(number) * factor - n_bytes) <= 0.0051 * n_bytes
    assert unit == "TiB" or float(number) < 1024
