"""The one place that turns a number of bytes into text."""

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40


def format_bytes(n_bytes: int, /) -> str:
    """Write a size with three significant digits and a binary unit.

    Example:
        >>> from torchfast._bytes import GIB, MIB, format_bytes
        >>> format_bytes(512), format_bytes(3 * MIB // 2), format_bytes(-GIB)
        ('512 B', '1.50 MiB', '-1.00 GiB')
    """
    sign, size = ("-", -n_bytes) if n_bytes < 0 else ("", n_bytes)
    if size < KIB:
        return f"{sign}{size} B"
    for unit, name in ((KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB")):
        # 1023.6 KiB would print as "1024 KiB": it belongs to the next unit.
        if size / unit < 1023.5:
            return f"{sign}{_three_digits(size / unit)} {name}"
    return f"{sign}{_three_digits(size / TIB)} TiB"


def _three_digits(value: float) -> str:
    if value < 9.995:
        return f"{value:.2f}"
    if value < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}"
