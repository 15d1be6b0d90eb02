"""Features in, scalar out: modules with the signatures of open_clip, and distributed exchange."""
