"""Images with texts or labels: tables, folders, tars, the built-in set, samplers and loaders."""
