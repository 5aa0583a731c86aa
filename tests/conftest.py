"""What holds for every test: no network, no account, and nothing of the developer's own settings."""

from __future__ import annotations

import os

# Set before any test imports ray, mlflow or transformers, and inherited by the workers they start.
os.environ.update(
    RAY_AUTH_MODE="disabled",  # otherwise a local Ray writes ~/.ray/auth_token and changes what later commands do
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # 1 GB of helpers that tests do not need
    MLFLOW_DISABLE_TELEMETRY="true",
    AWS_EC2_METADATA_DISABLED="true",
    MPLBACKEND="Agg",
)
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "DISTILLERY_CACHE"):
    os.environ.pop(name, None)
