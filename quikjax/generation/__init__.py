"""Generation under `jit`: prompts of any lengths, greedy or drawn, streamed; programs compiled once per bucket."""

from quikjax.generation.generator import Generation, Generator, generate
from quikjax.generation.sampling import Sampling

__all__ = ["Generation", "Generator", "Sampling", "generate"]
