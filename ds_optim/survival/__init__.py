"""What outlives a process, and must not harm the next one: locks, built libraries, shared memory, results."""
