"""Grids of runs: ablations, scaling laws. Resumable at any kill; each ends in a table, a plot and JSON."""
