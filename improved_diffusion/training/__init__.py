"""Parts of TrainLoop: checkpoints, resuming, statistics, signals."""
