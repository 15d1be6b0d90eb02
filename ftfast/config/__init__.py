"""Settings: dataclasses (schema), strict YAML, merging with origins, validation."""
