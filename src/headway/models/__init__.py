"""Architectures, weight loading and sharding. Weights are packed for one implementation of headway.ops at load."""
