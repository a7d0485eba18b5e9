"""What a user can mend, as opposed to what nobody foresaw. No imports: commands catch it before anything heavy loads."""


class UserError(ValueError):
    """A mistake in a recipe, a command, a file or the data; the message is one line that names it and the remedy.

    Commands print the message after `error: ` and end with exit code 1; library code raises it like any ValueError.
    """
