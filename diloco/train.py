"""`torchrun -m diloco.train +region=eu [KEY=VALUE ...]`: one region of a run, from its config to its end."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from contextlib import ExitStack
from typing import NoReturn

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns at every exit of a healthy job; read at import

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diloco.composing import FLAGS, compose_config
from diloco.config import Config, explain, validate
from diloco.errors import ConfigError

SPEAKER_SECONDS = 10.0
"""How long the other ranks leave the word to rank 0."""


def run(cfg: Config) -> int:
    """Trains. Returns the exit code: 0 if the run stopped or this region left on purpose."""
    _hush()
    from diloco import exchanging
    from diloco.control import Order
    from diloco.fold import JournalError
    from diloco.joining import join
    from diloco.keeping import disown, keep
    from diloco.leaving import Signals, depart, farewell, record_leave
    from diloco.parallel import open_region
    from diloco.trainer import Trainer
    from elastic.process import fork

    exchanges = fork(exchanging.main)  # before anything that a fork would not carry over
    signals = Signals(int(os.environ.get("RANK", 0)))
    with ExitStack() as stack, signals.excused():
        region = open_region(cfg.parallel)
        stack.callback(region.close)
        signals.trainer = trainer = Trainer(cfg, region)
        stack.callback(trainer.report.close)
        stack.callback(trainer.loader.close)
        try:
            join(trainer, stack, exchanges)
            signals.joined()
            order = trainer.train()
            depart(trainer)
            # Otherwise it stays a member, from whom others get the last rounds, until `keep` has stored them.
            if cfg.ckpt.durable:
                record_leave(trainer)
            keep(trainer, order)
        except (FloatingPointError, JournalError, OSError) as error:
            order = Order(end=str(error), clean=False)
            if region.rank != 0:  # of rank 0's, `farewell` speaks
                print(f"{cfg.region.name}, rank {region.rank}: {error}", flush=True)
            depart(trainer)
        if not order.clean:
            disown(trainer)
        record_leave(trainer)
        farewell(trainer, order)
        return 0 if order.clean else 1
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    if any(a in ("-m", "--multirun") for a in arguments):
        return fail("--multirun would sweep in lockstep inside every rank: use python -m launch.sweep -m OVERRIDES")
    flags = [a.split("=")[0] for a in arguments if a.startswith("-")]
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        return fail(f"{unknown[0]} is not known here: --help and --cfg job are, everything else is KEY=VALUE")
    try:
        if flags:
            return show()
        cfg = compose_config(arguments)
        validate(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        return run(cfg)
    except ConfigError as error:
        return fail(str(error))
    except KeyboardInterrupt:  # before the region is a member, when there is nothing to leave
        return 130
    except Exception:
        # Here, so that `leave` ends the process; in one piece: Python's own report lets other threads in between.
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), traceback.format_exc().encode())
        return 1


def _hush() -> None:
    """Three warnings of torch 2.13 that say nothing to a user: FSDP2's about a view nobody writes to, DTensor's about
    gathering a parameter over both mesh dims, which is what reading a flat slice is, and one about what torchdata calls."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def show() -> int:
    """Hydra's own --help, --cfg and the like. Raises ConfigError."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong with the overrides instead of printing it
    try:
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="config")(_nothing)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, sys.argv[1:]) from error
    return 0


def _nothing(composed: DictConfig) -> None:
    """The job that --help and the like do not run."""


def fail(sentence: str) -> int:
    """Bad input: one sentence, from one rank, exit code 2. torchrun ends all ranks as soon as one has ended, so the
    others leave the word to rank 0, unless the error is theirs alone."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SPEAKER_SECONDS)
    print(f"diloco.train: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """Ends the process. Not with sys.exit: a daemon thread inside a native call (a lighthouse's quorum, which can take
    seconds) aborts the interpreter's own finalization."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
