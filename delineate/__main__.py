"""`delineate` and `python -m delineate`: the one place where the parts are wired together.

Exit codes: 0 done, 1 a bug (with a traceback in the log), 2 something an
operator has to change (one line on stderr says what). `up` and `restart` have
more; README.md lists them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from delineate import __version__
from delineate.errors import OperatorError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="delineate", description="Many stored files in, one ZIP and a presigned URL out, in the background."
    )
    parser.add_argument("--version", action="version", version=f"delineate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in (("api", "serve REST and SSE until SIGTERM"), ("worker", "pack archives until SIGTERM")):
        process = commands.add_parser(name, help=purpose)
        process.add_argument("--ready", type=Path, metavar="FILE", help="a file to put the pid into while it works")
    commands.add_parser("up", help="start everything on this machine, Redis and S3 included, until Ctrl-C")
    restarting = commands.add_parser("restart", help="replace running processes by new ones, losing nothing")
    restarting.add_argument("processes", nargs="*", metavar="PROCESS", help="worker, api:api_00, ...; default: all")
    commands.add_parser("seed", help="put sample files into the source bucket")
    options = parser.parse_args(arguments)
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

    import uvloop

    from delineate.config import load_config
    from delineate.telemetry.logs import set_up_logs

    config = load_config()
    set_up_logs(config.log, f"delineate-{command}")
    if command == "api":
        from delineate.api.app import serve

        uvloop.run(serve(config, options.ready))
    elif command == "worker":
        from delineate.worker.loop import serve as work

        uvloop.run(work(config, options.ready))
    else:
        from delineate.seed import seed

        uvloop.run(seed(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
