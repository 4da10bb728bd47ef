"""What a process needs of its machine and leaves there: files, locks, built libraries, shared memory, its ranks."""
