"""Towers: open_clip models, the built-in tiny CLIPs, freezing, saving."""
