"""The container's commands.

    serve    nginx, API and workers under supervisord, which takes this process's place: in the container it is
             the first process, and does that one's duties (it reaps orphans, and its end is the container's)
    edge     nginx alone, in front of other containers

healthcheck.py tells whether what they started works.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from delineate.config import Config, load_config, read_environment
from delineate.errors import StartupError
from delineate.home import forget_processes, home_path, make_folders
from delineate.launch import (
    allow_many_open_files,
    find_file,
    launch_environment,
    process_settings,
    supervisord_command,
)
from delineate.nginx import Machine, Store, check, check_ports, command, render
from delineate.storage import store_address

FOLDERS = ("metrics", "run", "nginx")


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


def _open_home(environ: Mapping[str, str]) -> Path:
    home = home_path(environ)
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
    check_ports(config)
    check(conf)
    return conf


def _foreground(conf: Path) -> list[str]:
    return [*command(conf), "-g", "daemon off;"]
