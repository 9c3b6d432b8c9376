"""One algorithm, one file of pure maths on matrices: no trees, no files, no models."""
