"""Mistakes that the person at the keyboard can mend, reported without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence that says what is wrong and what to do about it."""


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Make a command print a `UserError` on stderr and exit with status 2.

    So it does with an error of the file system: no space left, not writable.
    """

    @functools.wraps(main)
    def command(*arguments: object) -> None:
        try:
            main(*arguments)
        except UserError as error:
            sentence = str(error)
        except OSError as error:
            if error.strerror is None:
                raise
            sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        else:
            return
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)

    return command
