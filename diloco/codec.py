"""Compression of pseudo-gradients: the config, and the codec that it means.

| codec | bytes per parameter | what it is |
|---|---|---|
| none | 4 | fp32 |
| bf16 | 2 | rounded |
| int8 | 1.0156 | a scale per 256 elements |
| int4 | 0.53125 | a scale per 64 elements |
| topk | 0.0283 | the 64 largest of every 4096, at 2 bits; sparse |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diloco.blockwise import Codec
from diloco.quantize import Bf16, Int4, Int8, NoCompression
from diloco.sparse import TopK

COMPILE_FROM = 8_000_000
"""Elements of a rank's share from which `codec.compile=auto` compiles: below it eager is fast enough."""


@dataclass
class CodecConfig:
    """`codec=none|bf16|int8|int4|topk`."""

    name: str = "int8"
    rounding: str = "nearest"
    """int8 and int4: nearest, or stochastic (unbiased; the same bytes for the same seed)."""
    error_feedback: bool = False
    """What compression left out of a contribution that was used is added to the next one; a plane of fp32."""
    feedback_decay: float = 1.0
    """That residual is multiplied by it: 0.95 in Covenant-72B."""
    compile: str = "auto"
    """always: compile the arithmetic at the start (needs a C++ compiler); never: run it eager; auto: compile if a rank has
    8 million parameters or more. All give the same bytes."""


BUILDERS: dict[str, Callable[[CodecConfig], Codec]] = {
    "none": lambda cfg: NoCompression(),
    "bf16": lambda cfg: Bf16(),
    "int8": lambda cfg: Int8(cfg.rounding),
    "int4": lambda cfg: Int4(cfg.rounding),
    "topk": lambda cfg: TopK(),
}


def build_codec(cfg: CodecConfig) -> Codec:
    return BUILDERS[cfg.name](cfg)


CODECS = {name: build_codec(CodecConfig(name)) for name in BUILDERS}
"""Every codec by name, as its defaults make it."""


def compiles(cfg: CodecConfig, elements: int) -> bool:
    """Whether a rank with so many elements in its slices compiles."""
    return cfg.compile == "always" or (cfg.compile == "auto" and elements >= COMPILE_FROM)
