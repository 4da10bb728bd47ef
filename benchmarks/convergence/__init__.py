"""Which optimizer to pick: a study that anyone can run again, go on with, and scale up (see ``study.yaml``)."""
