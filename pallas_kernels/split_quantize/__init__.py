"""`split_quantize`: gather base and outlier columns, per-token minimum and maximum, quantize; one pass over `x`."""
