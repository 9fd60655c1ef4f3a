"""The model of any config, for tables of models in tests."""

import importlib


def build(config):
    """Returns the model, without parameters: STARFlow(config) of a STARFlowConfig."""
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    return getattr(package, {"MLP": "VelocityMLP"}.get(name := type(config).__name__.removesuffix("Config"), name))(
        config
    )
