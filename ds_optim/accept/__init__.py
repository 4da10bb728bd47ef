"""Whether this package does on this machine what it does elsewhere: parts of checks, each in a process of its own."""
