"""`delineate healthcheck`, for HEALTHCHECK in the Dockerfile: does everything in this container work?

It does when its own processes do. Redis and the S3 store must have answered
once, for a release that cannot reach them must not replace one that can.
After that their outages are /health's business: nobody is helped when all
containers are replaced because Redis is away.
"""

from __future__ import annotations

import http.client
from pathlib import Path

from delineate.config import load_config, read_environment
from delineate.home import home_path, supervisor_socket
from delineate.ready import is_ready
from delineate.restart import UNREACHABLE, supervisor_at

ANSWER_SECONDS = 3


def healthcheck() -> int:
    """0 if everything here works, 1 if not; one line says what does not."""
    given = read_environment()
    home = home_path(given)
    alone = not (home / "run" / "supervisor.sock").exists()  # `delineate edge`
    problem = "" if alone else _sick_process(home)
    path = "/nginx_status" if alone else "/health/live"
    problem = problem or _no_answer(load_config(given).nginx.internal_port, path)
    print(problem or "healthy")
    return 1 if problem else 0


def _sick_process(home: Path) -> str:
    try:
        with supervisor_at(supervisor_socket(home)) as supervisor:
            infos = supervisor.getAllProcessInfo()
    except UNREACHABLE as error:
        return f"supervisord does not answer: {error}"
    for info in infos:
        name = f"{info['group']}:{info['name']}" if info["group"] != info["name"] else str(info["name"])
        if info["statename"] != "RUNNING":
            return f"{name} is {info['statename']}"
        if info["group"] in ("api", "worker") and not is_ready(home / "run" / f"{info['name']}.ready", info["pid"]):
            return f"{name} has not reached Redis and the S3 store yet"
    return ""


def _no_answer(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
        return "" if status == 200 else f"{path} says {status}"
    except (OSError, http.client.HTTPException) as error:
        return f"{path}: no answer ({error})"
    finally:
        connection.close()
