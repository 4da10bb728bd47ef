"""The errors a user can mend."""


class UserError(ValueError):
    """A mistake in what the user wrote: one line that says what to write instead.

    The command line prints the line and exits with status 2; the API raises it as the ``ValueError`` it is.
    """
