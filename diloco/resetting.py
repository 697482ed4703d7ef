"""What a region does when its work is not wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diloco.trainer import Trainer


def start_again(trainer: Trainer) -> None:
    """The norm rule rejected this region's work: it goes on from theta, and trains on those samples again that no contribution
    holds. What it has in flight stands. Collective."""
    flights, dropped = trainer.snapshots.copy(), trainer.clock.dropped
    restarted = {f: snapshot.restarted(trainer.planes.theta[f]) for f, snapshot in flights.items()}
    trainer.reader.forget(claim for snapshot in flights.values() for claim in snapshot.claims)
    trainer.adopt()
    trainer.snapshots, trainer.clock.dropped = restarted, dropped
    if trainer.region.rank == 0:
        print(f"{trainer.links.member}: its contribution was rejected, going on from the run's parameters", flush=True)


def resume_samples(trainer: Trainer) -> None:
    """After a restart, with the first leases: the samples that the local parameters have seen are not trained on again. If
    other samples come first now, that work is given up instead. Collective."""
    if not trainer.reader.resume(trainer.taken):
        trainer.take_theta()
        if trainer.region.rank == 0:
            print(
                f"{trainer.links.member}: another region has the samples that its uncommitted steps were made of: going on "
                "from the run's parameters",
                flush=True,
            )
    trainer.taken = {}
