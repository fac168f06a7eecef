"""How an engine and its worker processes talk: rings in shared memory on one node, TCP between nodes."""
