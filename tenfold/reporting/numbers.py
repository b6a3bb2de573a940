"""Numbers as people read them: three or four digits and a unit."""

from __future__ import annotations

from collections.abc import Mapping

from tenfold.records import Budget, Measurement
from tenfold.records.budget import LIMITED

QUANTITIES = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "latency"}
_PREFIXES = ("", "k", "M", "G", "T", "P")


def count(number: float) -> str:
    """Return a number with a metric prefix, four digits at most.

    Example:
        >>> count(126_480_000), count(1_100), count(12)
        ('126.5 M', '1.1 k', '12')
    """
    return _scaled(number, 1000, _PREFIXES).rstrip()


def size(number: float) -> str:
    """Return bytes with a binary prefix.

    Example:
        >>> size(3_500_000), size(12)
        ('3.3 MiB', '12 B')
    """
    return _scaled(number, 1024, ("B", *(f"{prefix}iB" for prefix in ("K", *_PREFIXES[2:]))))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= base - 0.05 and power < len(units) - 1:
        number /= base
        power += 1
    digits = f"{number:,.0f}" if power == 0 else f"{number:,.1f}"
    return f"{digits} {units[power]}"


def change(before: float, after: float) -> str:
    """Return both numbers, a unit that they share once.

    Example:
        >>> change(37_700_000, 7_300_000), change(1_200_000, 552_400)
        ('37.7 → 7.3 M', '1.2 M → 552.4 k')
    """
    old, new = count(before), count(after)
    unit = new.partition(" ")[2]
    return f"{old.removesuffix(f' {unit}') if unit else old} → {new}"


def factor(before: float, after: float) -> str:
    """Return how many times smaller ``after`` is; a dash where that means nothing.

    Example:
        >>> factor(10, 5), factor(101, 100), factor(10, 0)
        ('2.0×', '1×', '—')
    """
    if after <= 0 or before <= 0:
        return "—"
    ratio = before / after
    return f"{ratio:.1f}×" if abs(ratio - 1) >= 0.05 and ratio >= 0.1 else f"{ratio:.2g}×"


def percent(fraction: float) -> str:
    """Return a fraction in percent with two decimals.

    Example:
        >>> percent(0.9339)
        '93.39 %'
    """
    return f"{100 * fraction:.2f} %"


def milliseconds(value: float) -> str:
    """Return milliseconds with three significant digits.

    Example:
        >>> milliseconds(0.01234), milliseconds(4.5678), milliseconds(1234.5)
        ('0.0123 ms', '4.57 ms', '1,234 ms')
    """
    return f"{three_digits(value)} ms"


def interval(value: float, low: float, high: float) -> str:
    """Return milliseconds with their quartiles.

    Example:
        >>> interval(8.0, 7.5, 8.5)
        '8.00 ms [7.50–8.50]'
    """
    return f"{milliseconds(value)} [{three_digits(low)}–{three_digits(high)}]"


def three_digits(value: float) -> str:
    """Return a number with three significant digits, and no fewer than it has before the point.

    Example:
        >>> three_digits(1.5), three_digits(120.4)
        ('1.50', '120')
    """
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def speed(ratio: float) -> str:
    """Return how many times faster, or as fast where it is slower.

    Example:
        >>> speed(1.8), speed(0.5)
        ('1.80× faster', '0.50× as fast')
    """
    return f"{ratio:.2f}× {'faster' if ratio >= 1 else 'as fast'}"


def seconds(value: float) -> str:
    """Return a duration in the largest units that it fills.

    Example:
        >>> seconds(0.42), seconds(75), seconds(7384)
        ('0.4 s', '1 min 15 s', '2 h 3 min')
    """
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def ranks(rank: Mapping[str, int] | None) -> str:
    """Return ranks by name.

    Example:
        >>> ranks({"out": 24, "in": 20}), ranks({"rank": 7})
        ('out=24 in=20', 'rank=7')
    """
    return " ".join(f"{name}={value}" for name, value in (rank or {}).items())


def plural(number: int, word: str) -> str:
    """Return how many there are of something.

    Example:
        >>> plural(1, "layer"), plural(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def limits(budget: Budget, before: Measurement, of: str = " of the ") -> list[str]:
    """Return a budget in words, as shares of the model before where what that costs is known.

    Example:
        >>> limits(Budget(macs=0.5, max_params=300), Measurement(params=1000, macs=9000))
        ['30 % of the parameters', '50 % of the MACs']
    """
    found = []
    for name in budget.limited:
        words, whole = QUANTITIES[name], getattr(before, {"latency": "latency_ms"}.get(name, name))
        share, most = getattr(budget, name), getattr(budget, LIMITED[name])
        shares = [value for value in (share, most / whole if most and whole else None) if value is not None]
        found += [f"{100 * value:.3g} %{of}{words}" for value in shares]
        found += [f"{most:g} {'ms ' if name == 'latency' else ''}{words}"] if most and not whole else []
    return found
