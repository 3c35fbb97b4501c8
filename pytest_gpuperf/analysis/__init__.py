"""What is made of results once they are there: leaves, imported lazily, never needed to understand the core."""
