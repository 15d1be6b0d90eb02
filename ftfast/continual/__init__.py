"""Learn tasks one after the other: ``ftfast continual``."""
