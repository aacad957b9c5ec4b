"""The one exception for anything a user can put right."""


class LabError(Exception):
    """Bad input or an environment that cannot do what the config asks.

    The message is a single line that names the file, row or key, says what is wrong and what to do.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
