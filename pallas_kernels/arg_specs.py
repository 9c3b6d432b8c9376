"""The shapes that kernels are compiled, tuned and timed for: every quantized linear layer of the models QUIK was shown on, and of
the two that INT4 was.

Outliers follow QUIK's rule: 256 per hidden-size input, in proportion to the width for the wide inputs of LLaMA and Falcon, 256
everywhere for OPT; a sixteenth of the hidden size for models as small as SmolLM2, BERT and GPT-2. The wide inputs of LLaMA and
Falcon are W8A8.
"""

import dataclasses
from collections.abc import Iterator

from quikjax.pallas_kernels.split_quantize.producers import (
    Gelu,
    Identity,
    LayerNorm,
    Producer,
    Relu,
    RmsNorm,
    SiluMul,
)

ROWS = (1, 2, 3, 8, 17, 64, 129, 2048, 8192)
OUTLIERS = (0, 1, 36, 96, 256, 284, 512, 688, 896, 1024, 1136, 1792)


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """One linear layer: `outputs` (`N`) x `inputs` (`K`), `outliers` of `K`, bits of weights and activations, what feeds it."""

    model: str
    name: str
    outputs: int
    inputs: int
    outliers: int
    weight_bits: int = 4
    bits: int = 4
    bias: bool = False
    producer: Producer = Identity()  # noqa: RUF009 -- frozen, without state

    @property
    def base(self) -> int:
        return self.inputs - self.outliers


def _llama(model: str, hidden: int, mlp: int, key_value: int, outliers: int = 256) -> Iterator[LinearSpec]:
    wide = round(outliers * mlp / hidden)
    yield LinearSpec(model, "q", hidden, hidden, outliers, producer=RmsNorm())
    if key_value != hidden:
        yield LinearSpec(model, "k", key_value, hidden, outliers, producer=RmsNorm())
    yield LinearSpec(model, "o", hidden, hidden, outliers)
    yield LinearSpec(model, "gate", mlp, hidden, outliers, producer=RmsNorm())
    yield LinearSpec(model, "down", hidden, mlp, wide, 8, 8, producer=SiluMul())


def _opt(model: str, hidden: int) -> Iterator[LinearSpec]:
    yield LinearSpec(model, "q", hidden, hidden, 256, bias=True, producer=LayerNorm())
    yield LinearSpec(model, "out", hidden, hidden, 256, bias=True)
    yield LinearSpec(model, "fc1", 4 * hidden, hidden, 256, bias=True, producer=LayerNorm())
    yield LinearSpec(model, "fc2", hidden, 4 * hidden, 256, bias=True, producer=Relu())


def _falcon(model: str, hidden: int, qkv: int, outliers: int = 256) -> Iterator[LinearSpec]:
    yield LinearSpec(model, "qkv", qkv, hidden, outliers, producer=LayerNorm())
    yield LinearSpec(model, "dense", hidden, hidden, outliers)
    yield LinearSpec(model, "h_to_4h", 4 * hidden, hidden, outliers, producer=LayerNorm())
    yield LinearSpec(model, "4h_to_h", hidden, 4 * hidden, 4 * outliers, 8, 8, producer=Gelu())


def _bert(model: str, hidden: int, outliers: int) -> Iterator[LinearSpec]:
    # Norms stand behind the sums, and their result is added to the next one: they are not the layers' own.
    yield LinearSpec(model, "q", hidden, hidden, outliers, bias=True)
    yield LinearSpec(model, "out", hidden, hidden, outliers, bias=True)
    yield LinearSpec(model, "fc1", 4 * hidden, hidden, outliers, bias=True)
    yield LinearSpec(model, "fc2", hidden, 4 * hidden, 4 * outliers, bias=True, producer=Gelu())


def _gpt2(model: str, hidden: int, outliers: int) -> Iterator[LinearSpec]:
    yield LinearSpec(model, "qkv", 3 * hidden, hidden, outliers, bias=True, producer=LayerNorm())
    yield LinearSpec(model, "out", hidden, hidden, outliers, bias=True)
    yield LinearSpec(model, "fc1", 4 * hidden, hidden, outliers, bias=True, producer=LayerNorm())
    yield LinearSpec(model, "fc2", hidden, 4 * hidden, 4 * outliers, bias=True, producer=Gelu(approximate=True))


MODELS: dict[str, tuple[LinearSpec, ...]] = {
    "llama-2-7b": tuple(_llama("llama-2-7b", 4096, 11008, 4096)),
    "llama-2-13b": tuple(_llama("llama-2-13b", 5120, 13824, 5120)),
    "llama-2-70b": tuple(_llama("llama-2-70b", 8192, 28672, 1024)),
    "opt-6.7b": tuple(_opt("opt-6.7b", 4096)),
    "opt-66b": tuple(_opt("opt-66b", 9216)),
    # Falcon-7B's outliers are a sixteenth of 4544 (and of 4 x 4544).
    "falcon-7b": tuple(_falcon("falcon-7b", 4544, 4672, 284)),
    "falcon-40b": tuple(_falcon("falcon-40b", 8192, 9216)),
    # 14848 hidden; 232 heads of query, 8 of key and value, 64 wide.
    "falcon-180b": tuple(_falcon("falcon-180b", 14848, 14848 + 2 * 8 * 64)),
    "smollm2-135m": tuple(_llama("smollm2-135m", 576, 1536, 192, 36)),
    "bert-base": tuple(_bert("bert-base", 768, 48)),
    "gpt2": tuple(_gpt2("gpt2", 768, 48)),
}

# Blocks whose time the paper gives.
BLOCKS: dict[str, tuple[LinearSpec, ...]] = {
    "opt-66b": MODELS["opt-66b"],
    "llama-2-70b": MODELS["llama-2-70b"],
    "falcon-180b": MODELS["falcon-180b"],
}


def all_linears() -> list[LinearSpec]:
    """Every layer of every model, and the list of outlier counts at one shape."""
    specs = [spec for model in MODELS.values() for spec in model]
    return specs + [LinearSpec("outliers", str(o), 4096, 4096, o) for o in OUTLIERS]
