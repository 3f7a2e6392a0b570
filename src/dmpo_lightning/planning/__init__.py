"""What a configuration will need: parameters, memory per GPU, forwards per buffer. No weights are read."""

from dmpo_lightning.planning.memory import Memory, estimate_memory
from dmpo_lightning.planning.parameters import Architecture, Parameters, count_parameters, read_architecture
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.planning.schedule import Schedule
from dmpo_lightning.planning.settings import Adapter, Settings, Workload
from dmpo_lightning.planning.sharding import Sharding, sharding_of

__all__ = [
    "Adapter",
    "Architecture",
    "Memory",
    "Parameters",
    "Precision",
    "Schedule",
    "Settings",
    "Sharding",
    "Workload",
    "count_parameters",
    "estimate_memory",
    "read_architecture",
    "sharding_of",
]
