"""What a person can do something about."""


class RequestError(ValueError):
    """A command that cannot be carried out; one sentence with the key, the value and the fix."""
