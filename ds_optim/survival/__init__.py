"""What lets a run outlive kills, signals, lost ranks and full disks: sealed checkpoints, resume, watch."""
