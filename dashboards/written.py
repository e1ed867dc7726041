"""All dashboards as the text of their files."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import api_overview, download_jobs, infrastructure

FOLDER = Path(__file__).resolve().parent


def written() -> dict[str, str]:
    """File name -> content."""
    made = {
        "api-overview.json": api_overview.build().build(),
        "download-jobs.json": download_jobs.build().build(),
        "infrastructure.json": infrastructure.build().build(),
    }
    return {name: json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n" for name, board in made.items()}
