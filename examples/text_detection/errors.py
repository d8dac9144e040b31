"""Mistakes that the person at the keyboard can mend, reported without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence that says what is wrong and what to do about it."""


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Make a command print a `UserError` on stderr and exit with status 2."""

    @functools.wraps(main)
    def command(*arguments: object) -> None:
        try:
            main(*arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return command
