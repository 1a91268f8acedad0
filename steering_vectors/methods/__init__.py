"""How directions are found: one file per family, all of them in one registry.

Owns the list of families. Knows nothing of layers' choice, of calibration or of files.
"""

from steering_vectors.methods import mean_diff, pca, probe
from steering_vectors.methods.registry import (
    Directions,
    Method,
    Task,
    method_named,
    method_names,
    register,
)

for _family in (mean_diff, pca, probe):
    register(_family.METHOD)

__all__ = ["Directions", "Method", "Task", "method_named", "method_names", "register"]
