"""Options as a command line has them."""

from __future__ import annotations


def flags(**options: object) -> list[str]:
    """`flags(held_out=2)` is `["--held-out", "2"]`; True is a flag without a value."""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words
