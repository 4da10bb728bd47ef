"""Before a run starts: the nodes of a job, and what would go wrong on them."""
