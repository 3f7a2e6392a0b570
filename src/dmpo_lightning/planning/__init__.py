"""What a configuration will need: parameters, memory per GPU, forwards per buffer. No weights are read."""

from dmpo_lightning.planning.forwards import Forwards
from dmpo_lightning.planning.memory import Memory, estimate_memory
from dmpo_lightning.planning.parameters import Architecture, Parameters, count_parameters, read_architecture
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.planning.settings import Settings
from dmpo_lightning.planning.strategy import Sharding, sharding_of
from dmpo_lightning.planning.workload import Workload

__all__ = [
    "Architecture",
    "Forwards",
    "Memory",
    "Parameters",
    "Precision",
    "Settings",
    "Sharding",
    "Workload",
    "count_parameters",
    "estimate_memory",
    "read_architecture",
    "sharding_of",
]
