"""The one error type a user sees as a single line."""


class UserError(Exception):
    """Something the user gave (a config value, a file, a run folder) cannot be used.

    The message is one line: what was wrong, where, what is allowed. The command line prints it without a
    traceback; programs may catch it.

    Attributes:
      exit_code: 2 for bad usage or a bad configuration, 1 for a failure while running.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code
