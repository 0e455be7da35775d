"""What users can put right: the one exception type that the command line prints without a traceback."""


class UserError(Exception):
    """Something the user can fix.

    `message` names the value that is wrong and what is allowed; `hint` is the next command or the nearest name.
    The command line prints both on stderr and exits with code 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
