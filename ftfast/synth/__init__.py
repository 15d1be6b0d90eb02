"""Image-caption pairs from a text-to-image pipeline, for replay: ``ftfast synth``, and the built-in generator."""
