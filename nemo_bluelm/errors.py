"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake in a recipe, a file, a flag or the environment, told in one line.

    The message names the key or file, what was found, and the way out. The command line prints it on stderr
    without a traceback and exits with code 2; every other exception is a bug and keeps its traceback.
    """

    EXIT_CODE = 2

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
