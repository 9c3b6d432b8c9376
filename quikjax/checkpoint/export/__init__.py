"""Artifacts in formats that others read."""
