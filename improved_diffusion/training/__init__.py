"""What TrainLoop stands on."""
