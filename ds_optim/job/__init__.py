"""A run from outside: what it is told (settings, presets, model), what it gives back and logs, how it ends."""
