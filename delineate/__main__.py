"""`delineate` and `python -m delineate`: the one place where the parts are wired together.

Exit codes: 0 done, 1 a bug (with a traceback in the log), 2 something an
operator has to change (one line says what: in the log, or on stderr where there
is none yet). `up`, `serve`, `restart`, `jobs` and `queue` have more; README.md
lists them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from delineate.arguments import parse_arguments
from delineate.errors import OperatorError

if TYPE_CHECKING:
    from delineate.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return _run(options)
    except OperatorError as error:
        print(f"delineate {options.command}: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    command: str = options.command
    # Imported here so that a worker does not load the web server, nor an API process the packer.
    if command == "up":
        from delineate.up import run_embedded

        return run_embedded()
    if command == "restart":
        from delineate.restart import restart

        return restart(options.processes)
    if command == "healthcheck":
        from delineate.healthcheck import healthcheck

        return healthcheck()
    if command in ("serve", "edge"):
        from delineate import serve as container

        container.serve() if command == "serve" else container.edge()

    import uvloop

    from delineate.config import load_config, read_environment
    from delineate.telemetry.logs import set_up_logs

    if command in ("jobs", "queue"):
        from delineate.home import service_environment
        from delineate.operate import operate

        return uvloop.run(operate(load_config(service_environment(read_environment())), options))

    config = load_config()
    set_up_logs(config.log, f"delineate-{command}")
    try:
        _serve(config, options)
    except OperatorError as error:
        logging.getLogger("delineate").critical("%s", error)
        return 2
    return 0


def _serve(config: Config, options: argparse.Namespace) -> None:
    import uvloop

    command: str = options.command
    if command in ("api", "worker"):
        from delineate.telemetry.processes import registered
        from delineate.telemetry.tracing import tracing

        # Before the rest is imported, which opens this process' metrics.
        with (
            registered(config.telemetry, command),
            tracing(config.telemetry.traces, f"delineate-{command}", config.environment),
        ):
            if command == "api":
                from delineate.api.app import serve

                uvloop.run(serve(config, options.ready))
            else:
                from delineate.worker.loop import serve as work

                uvloop.run(work(config, options.ready))
    else:
        from delineate.seed import make_buckets, seed_when_ready

        uvloop.run(make_buckets(config) if command == "buckets" else seed_when_ready(config))


if __name__ == "__main__":
    sys.exit(main())
