"""The modules whose annotations of shapes are checked at every call. Imports nothing of the package."""

# Not the native backbones: transformers makes dataclasses of their configurations in a way that does not survive the
# hook. `tests/test_imports.py` sees to it that every module that states shapes is here.
CHECKED = (
    "data.demonstrations",
    "data.prompts",
    "distributed.ranks",
    "evaluation",
    "functional",
    "models.parts",
    "models.head",
    "models.kv_cache",
    "models.layers",
    "models.loading",
    "models.lora",
    "models.routing",
    "objectives",
    "policy",
    "rewards",
    "rollout",
    "samplers",
)
