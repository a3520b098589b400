"""What a training run will need, from sizes alone: memory, FLOPs, time, and what to change."""
