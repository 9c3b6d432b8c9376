"""Studies of what decides a quantized model's accuracy: grids of runs, resumable, each a table, a plot and JSON."""
