"""The one error that is the user's to mend: shown as a sentence, without a traceback, exit code 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. Its text is one sentence that names the key, its value and the fix."""
