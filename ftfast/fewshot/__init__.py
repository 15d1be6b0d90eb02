"""Few-shot protocols over many data sets: ``ftfast fewshot``."""
