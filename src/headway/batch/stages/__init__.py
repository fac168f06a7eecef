"""What rows go through."""
