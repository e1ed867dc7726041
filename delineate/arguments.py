"""The command line: every command, its options, and the words of --help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from delineate import __version__
from delineate.job import JobStatus

ENDED = [status.value for status in JobStatus if status.is_final]
_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}

Commands = argparse._SubParsersAction  # has no public name


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; prints usage and exits with 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="delineate", description="Many stored files in, one ZIP and a presigned URL out, in the background."
    )
    parser.add_argument("--version", action="version", version=f"delineate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in (("api", "serve REST and SSE until SIGTERM"), ("worker", "pack archives until SIGTERM")):
        process = commands.add_parser(name, help=purpose)
        process.add_argument("--ready", type=Path, metavar="FILE", help="a file to put the pid into while it works")
    commands.add_parser("up", help="start everything on this machine, Redis and S3 included, until Ctrl-C")
    commands.add_parser("serve", help="start nginx, API and workers; Redis and S3 are elsewhere (the image's command)")
    commands.add_parser("edge", help="start nginx alone and spread requests over containers (nginx.upstream)")
    commands.add_parser("healthcheck", help="tell whether everything that `serve` or `edge` started works")
    restarting = commands.add_parser("restart", help="replace running processes by new ones, losing nothing")
    restarting.add_argument("processes", nargs="*", metavar="PROCESS", help="worker, api:api_00, ...; default: all")
    commands.add_parser("buckets", help="create the missing buckets and set the rule that removes old archives")
    commands.add_parser("seed", help="put sample files into the source bucket")
    _add_jobs(commands)
    _add_queue(commands)
    options = parser.parse_args(arguments)
    if "jobs" in options and not options.jobs and not (options.all if "all" in options else options.status):
        everyone = "--all" if "all" in options else "--status STATUS"
        parser.error(f"jobs {options.action}: name at least one JOB, or use {everyone}")
    return options


def _add_jobs(commands: Commands[argparse.ArgumentParser]) -> None:
    jobs = commands.add_parser("jobs", help="look at jobs, retry, cancel or purge them")
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = _action(actions, "list", "running, waiting and failed jobs, or those of other statuses")
    listing.add_argument("--status", action="append", choices=[*JobStatus], help="may be given more than once")
    listing.add_argument("--user", help="jobs of this caller only, as `show` names it")
    listing.add_argument("--limit", type=_count, default=50, metavar="N", help="at most so many (50)")

    showing = _action(actions, "show", "everything that is known of one job")
    showing.add_argument("job", metavar="JOB")

    for name, purpose, everyone in (
        ("retry", "put failed or cancelled jobs back into the queue", "every failed job"),
        ("cancel", "cancel waiting and running jobs", "every waiting and running job"),
    ):
        changing = _action(actions, name, purpose)
        changing.add_argument("jobs", nargs="*", metavar="JOB")
        changing.add_argument("--all", action="store_true", help=everyone)
        changing.add_argument("--user", help="with --all: of this caller only")

    purging = _action(actions, "purge", "forget ended jobs before their time, and remove their archives")
    purging.add_argument("jobs", nargs="*", metavar="JOB")
    purging.add_argument("--status", action="append", choices=ENDED, help="every job of that status")
    purging.add_argument("--user", help="with --status: of this caller only")
    purging.add_argument(
        "--older-than",
        type=_duration,
        default=0,
        metavar="AGE",
        help="with --status: ended at least so long ago, e.g. 90s, 15m, 12h, 7d",
    )


def _add_queue(commands: Commands[argparse.ArgumentParser]) -> None:
    queue = commands.add_parser("queue", help="count, pause, resume or drain the queue")
    actions = queue.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "stats", "how many jobs wait, run and failed, and how many workers there are")
    _action(actions, "pause", "have no waiting job started; running ones go on, new ones are accepted")
    _action(actions, "resume", "end a pause")
    draining = _action(actions, "drain", "pause, and wait until nothing runs any more")
    draining.add_argument("--timeout", type=_duration, default=300, metavar="TIME", help="give up after (300s)")


def _action(actions: Commands[argparse.ArgumentParser], name: str, purpose: str) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    action.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return action


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _duration(text: str) -> int:
    """Seconds."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 15m, 12h or 7d")
    return int(found[1]) * _UNITS[found[2]]
