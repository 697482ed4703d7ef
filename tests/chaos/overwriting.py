"""`diloco.train` with the commit rule broken on purpose: rounds are not created only if absent; a member looks whether there is
an entry, and then writes its own, as one would with a store that has no conditional writes, a (very) long round trip away.

What tests.bench.chaos must find: who sleeps between the two writes over what the others have committed meanwhile.
"""

from __future__ import annotations

import time
from typing import Any

from diloco import train
from diloco.fold import encode_entry, invalid
from diloco.journal import Journal, entry_key

ROUND_TRIP = 1.0
create = Journal.append


def append(self: Any, fields: dict[str, Any]) -> bool:
    """Journal.append, broken for rounds."""
    if fields["kind"] != "round":
        return create(self, fields)
    key = entry_key(self.next_seq)
    if (self.state is not None and invalid(self.state, fields)) or self.store.exists(key):
        return False
    data = encode_entry(fields, self.next_seq, self.state.hash if self.state else "")
    time.sleep(ROUND_TRIP)
    self.store.write(key, data)
    return True


if __name__ == "__main__":
    Journal.append = append  # type: ignore[method-assign]
    train.leave(train.main())
