"""What quantizing a model will do and take, before a weight is read."""
