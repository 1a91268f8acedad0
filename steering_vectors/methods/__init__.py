"""Methods: how directions are found, one file per family. Knows nothing of calibration or of files."""

from steering_vectors.methods import bipo, contrast_prompts, mean_diff, pca, probe, rahf
from steering_vectors.methods.registry import (
    Directions,
    Method,
    Task,
    method_named,
    method_names,
    register,
)

for _method in (mean_diff.METHOD, pca.METHOD, probe.METHOD, contrast_prompts.METHOD, bipo.METHOD, rahf.SCIT, rahf.DUAL):
    register(_method)

__all__ = ["Directions", "Method", "Task", "method_named", "method_names", "register"]
