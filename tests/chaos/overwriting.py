"""`diloco.train` with the commit rule broken on purpose: an entry is written, whether or not there is one already.

What tests.bench.chaos must find: a region that slept while the others committed writes over their entry when it wakes up.
"""

from __future__ import annotations

from typing import Any

from diloco import train
from diloco.fold import encode_entry, invalid
from diloco.journal import Journal, entry_key


def append(self: Any, fields: dict[str, Any]) -> bool:
    """Journal.append with `write` in the place of `create`."""
    if self.state is not None and invalid(self.state, fields):
        return False
    data = encode_entry(fields, self.next_seq, self.state.hash if self.state else "")
    self.store.write(entry_key(self.next_seq), data)
    return True


if __name__ == "__main__":
    Journal.append = append  # type: ignore[method-assign]
    train.leave(train.main())
