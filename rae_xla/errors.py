"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command: one line that names it and says what to do.

    Tools print it on stderr and exit with 2.
    """
