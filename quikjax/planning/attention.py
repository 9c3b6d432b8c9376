"""Plan attention: whether the GPU kernels of `pallas_kernels.flash_attention` take it, read and decoded, or why not."""

import dataclasses
from typing import Any

from quikjax.models.base import Config
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.flash_attention.choice import AttentionProblem, why_not


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The reason why no kernel takes attention and XLA runs it: of whole texts, and of one token more; `None` where one does.

    `generates`: there is a token more; not with an encoder.
    """

    prefill: str | None
    decode: str | None
    generates: bool = True

    def __str__(self) -> str:
        """In words.

        >>> print(AttentionPlan(prefill="prompts are float32", decode=None))
        prefill by XLA (prompts are float32), decode by a kernel
        """
        prefill, decode = ("by a kernel" if why is None else f"by XLA ({why})" for why in (self.prefill, self.decode))
        return f"prefill {prefill}, decode {decode}" if self.generates and prefill != decode else prefill


def plan_attention(config: Config, device: Device, dtype: Any, batch: int, length: int, generates: bool) -> AttentionPlan:
    """Of `batch` texts of `length` tokens, keys and values kept in the `dtype` of the activations."""
    shape = (config.heads, config.kv_heads, config.head_size, length, dtype, dtype)
    return AttentionPlan(
        prefill=why_not(AttentionProblem(batch, length, *shape, cached=False), device),
        decode=why_not(AttentionProblem(batch, 1, *shape, cached=True), device),
        generates=generates,
    )
