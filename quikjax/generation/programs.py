"""Programs compiled once and kept: by what they are specialized to, and counted."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from quikjax.rounds import peak_bytes


class Programs:
    """Executables by name, static arguments and the arguments' shapes. `compiled` counts them, `seconds` is what they took.

    A program is traced and compiled when it is first asked for; JAX's compilation cache, where one is set up
    (`generation.executables`), spares the compiling. `largest` is the most memory in bytes that any program run since it was
    last set to 0 has at its peak, arguments and results included, by the compiler's own account; 0 where that keeps none.
    """

    def __init__(self) -> None:
        self.compiled = 0
        self.seconds = 0.0
        self.largest = 0
        self._kept: dict[Any, Any] = {}

    def run(
        self,
        function: Callable[..., Any],
        static: Sequence[Any],
        arguments: Sequence[Any],
        *,
        named: Mapping[str, Any] | None = None,
        donate: Sequence[int] = (),
    ) -> Any:
        """`function(*static, *arguments, **named)`, under `jit`; `donate` numbers the `arguments` whose memory is used again.

        `static` and `named` are what the program is specialized to, and hashable.
        """
        leaves, structure = jax.tree.flatten(tuple(arguments))
        key = (
            function,
            tuple(static),
            tuple((named or {}).items()),
            structure,
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
        )
        if key not in self._kept:
            start = time.perf_counter()
            bound = jax.jit(functools.partial(function, *static, **(named or {})), donate_argnums=tuple(donate))
            program = bound.lower(*arguments).compile()
            self._kept[key] = program, peak_bytes(program)
            self.seconds += time.perf_counter() - start
            self.compiled += 1
        program, needed = self._kept[key]
        self.largest = max(self.largest, needed)
        return program(*arguments)
