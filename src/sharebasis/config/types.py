"""Names that settings choose from."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt

SplitStrategy = Literal["none", "qkv", "heads"]
Family = Literal["q", "k", "v", "o", "gate", "up", "down", "fused", "other"]
DType = Literal["float32", "bfloat16", "float16"]

Storage = Literal["plain", "interpolative"]
Side = Literal["input", "output"]
Labels = Literal["text", "model"]

PositiveInt = Annotated[int, Gt(0)]
