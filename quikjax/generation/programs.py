"""Programs compiled once and kept: by what they are specialized to, and counted."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


class Programs:
    """Executables by name, static arguments and the arguments' shapes. `compiled` counts them, `seconds` is what they took.

    A program is traced and compiled when it is first asked for; JAX's compilation cache, where one is set up
    (`generation.executables`), spares the compiling.
    """

    def __init__(self) -> None:
        self.compiled = 0
        self.seconds = 0.0
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
        program = self._kept.get(key)
        if program is None:
            start = time.perf_counter()
            bound = jax.jit(functools.partial(function, *static, **(named or {})), donate_argnums=tuple(donate))
            program = bound.lower(*arguments).compile()
            self._kept[key] = program
            self.seconds += time.perf_counter() - start
            self.compiled += 1
        return program(*arguments)
