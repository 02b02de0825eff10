"""The engine: many tasks, one forward pass. Knows no HTTP and no registry."""
