"""`delineate` and `python -m delineate`: the one place where the parts are wired together.

Exit codes: 0 done, 1 a bug (with a traceback in the log), 2 something an
operator has to change (one line on stderr says what).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from delineate import __version__
from delineate.errors import OperatorError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="delineate", description="Many stored files in, one ZIP and a presigned URL out, in the background."
    )
    parser.add_argument("--version", action="version", version=f"delineate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("api", help="serve REST and SSE until SIGTERM")
    commands.add_parser("worker", help="pack archives until SIGTERM")
    commands.add_parser("up", help="start everything on this machine, Redis and S3 included, until Ctrl-C")
    commands.add_parser("seed", help="put sample files into the source bucket")
    command = parser.parse_args(arguments).command
    try:
        return _run(command)
    except OperatorError as error:
        print(f"delineate {command}: {error}", file=sys.stderr)
        return 2


def _run(command: str) -> int:
    # Imported here so that a worker does not load the web server, nor an API process the packer.
    if command == "up":
        from delineate.up import run_embedded

        return run_embedded()

    import uvloop

    from delineate.config import load_config
    from delineate.telemetry.logs import set_up_logs

    config = load_config()
    set_up_logs(config.log, f"delineate-{command}")
    if command == "api":
        from delineate.api.app import serve

        uvloop.run(serve(config))
    elif command == "worker":
        from delineate.worker.loop import serve as work

        uvloop.run(work(config))
    else:
        from delineate.seed import seed

        uvloop.run(seed(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
