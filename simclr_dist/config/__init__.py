"""What to learn: the configuration of a run, read from YAML and `key=value`, checked before anything starts."""

from simclr_dist.config.schema import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    Count,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    MonitorConfig,
    NonNegative,
    OptimConfig,
    Positive,
    Precision,
    Section,
    TimeoutConfig,
    TrainConfig,
    json_schema,
    parse_config,
)
from simclr_dist.config.yaml_source import load_config, load_section, render_config
from simclr_dist.errors import ConfigError

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "Count",
    "DataConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "NonNegative",
    "OptimConfig",
    "Positive",
    "Precision",
    "Section",
    "TimeoutConfig",
    "TrainConfig",
    "json_schema",
    "load_config",
    "load_section",
    "parse_config",
    "render_config",
]
