"""Everything that looks at parameters: Fisher estimation, anchors, the anchored optimizer, interpolation."""
