"""Shape and axes of the array that a packed weight stands for."""

import math


class Kernel:
    """Shape and axes of the array that a packed weight replaces, from two static fields of its own.

    `shape` of that array, and `in_axes`, its input axes; the others, in order, are the outputs.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """`K`, the number of input columns."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def outputs(self) -> int:
        """`N`, the number of output rows."""
        return math.prod(self.out_shape)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes' lengths: the trailing dimensions of an activation."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes' lengths: the trailing dimensions of a result."""
        return tuple(length for axis, length in enumerate(self.shape) if axis not in self.in_axes)
