"""`quik_matmul`: integer product, outlier product, zero-point term, scales, bias and cast in one kernel."""
