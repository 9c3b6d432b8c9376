"""Weight-only products with 4-bit codebooks: 16-bit activations times `F[code] absmax`."""
