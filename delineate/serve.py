"""The container's commands: `delineate serve`, `delineate edge`, `delineate healthcheck`.

    serve         nginx, API and workers under supervisord, which takes this process's place: in the container it is
                  the first process, and does that one's duties (it reaps orphans, and its end is the container's)
    edge          nginx alone, in front of other containers
    healthcheck   is everything that was started here at work? For HEALTHCHECK in the Dockerfile

A container is healthy when its own processes work. Redis and the S3 store
must have answered once, for a release that cannot reach them must not
replace one that can. After that their outages are /health's business: nobody
is helped when all containers are replaced because Redis is away.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from delineate.config import Config, load_config, read_environment
from delineate.errors import StartupError
from delineate.home import DEFAULT_HOME, forget_processes, make_folders, supervisor_socket
from delineate.launch import (
    allow_many_open_files,
    find_file,
    launch_environment,
    process_settings,
    supervisord_command,
)
from delineate.nginx import Machine, Store, check, command, render
from delineate.ready import is_ready
from delineate.restart import UNREACHABLE, supervisor_at
from delineate.storage import store_address

FOLDERS = ("metrics", "run", "nginx")
ANSWER_SECONDS = 3


def serve() -> NoReturn:
    """Become supervisord. Raises ConfigError or StartupError while nothing has been started."""
    given = read_environment()
    conf = find_file("supervisord.conf")
    home = _open_home(given)
    sock = home / "run" / "supervisor.sock"
    environ = launch_environment(given, home, sock, "container")
    config = load_config(environ)
    allow_many_open_files()
    nginx_conf = _configure_nginx(config, home, edge=False)
    environ |= process_settings(config, sock) | {"DELINEATE_NGINX_COMMAND": shlex.join(_foreground(nginx_conf))}
    line = supervisord_command(conf)
    os.execve(line[0], line, environ)  # noqa: S606  # no shell wanted: the pid must stay the same


def edge() -> NoReturn:
    """Become nginx. Raises ConfigError or StartupError while nothing has been started."""
    given = read_environment()
    config = load_config(given)
    if not config.nginx.upstream:
        raise StartupError("nginx.upstream says nothing: name the containers to spread requests over, e.g. app:80")
    home = _open_home(given)
    allow_many_open_files()
    nginx_conf = _configure_nginx(config, home, edge=True)
    line = _foreground(nginx_conf)
    os.execve(line[0], line, given)  # noqa: S606


def healthcheck() -> int:
    """0 if everything here works, 1 if not; one line says what does not."""
    given = read_environment()
    home = _home(given)
    problem = _sick_process(home) if (home / "run" / "supervisor.sock").exists() else ""
    served = "/nginx_status" if not (home / "run" / "supervisor.sock").exists() else "/health/live"
    problem = problem or _no_answer(load_config(given).nginx.internal_port, served)
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


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("DELINEATE_HOME") or DEFAULT_HOME).absolute()


def _open_home(environ: Mapping[str, str]) -> Path:
    home = _home(environ)
    make_folders(home, FOLDERS)
    forget_processes(home)
    return home


def _configure_nginx(config: Config, home: Path, *, edge: bool) -> Path:
    """Write nginx.conf and have nginx check it. Raises StartupError."""
    address = asyncio.run(store_address(config.storage))
    store = Store(url=address.archives_url, ca_file=address.ca_file)
    folder = home / "nginx"
    conf = folder / "nginx.conf"
    template = find_file("nginx.conf").read_text(encoding="utf-8")
    conf.write_text(render(template, config, store, folder, Machine.look(), edge=edge), encoding="utf-8")
    check(conf)
    return conf


def _foreground(conf: Path) -> list[str]:
    return [*command(conf), "-g", "daemon off;"]
