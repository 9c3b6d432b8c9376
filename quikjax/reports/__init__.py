"""What an artifact says of itself."""
