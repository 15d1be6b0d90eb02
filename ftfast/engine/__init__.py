"""The loop that runs any recipe: devices, precision, checkpoints, resume, logs."""
