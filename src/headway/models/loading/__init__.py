"""Reading checkpoints: configurations without torch, weights one tensor at a time."""
