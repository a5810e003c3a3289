"""The command `pagerduty-compat`: check event files, or run the service."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

from .events import MAX_BYTES, InvalidEvent, parse
from .settings import InvalidSetting, read_routing_keys, read_settings

APP = "pagerduty_compat.server:create_app()"

# Options that gunicorn takes, and that break what the service promises.
_REFUSED = {
    "-D": "would take events off stdout",
    "--daemon": "would take events off stdout",
    "--capture-output": "would take events off stdout",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="pagerduty-compat", description=__doc__)
    parser.add_argument("--version", action="version", version=version("pagerduty-compat"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "validate",
        help="check event files as the service would",
        description="Check that each file holds one event that PagerDuty's Events API v2 accepts."
        " Prints a line for each thing that is wrong. Needs no web framework.",
        epilog="exit status: 0 all are valid, 1 an event is refused, 2 a file cannot be read",
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="an event as JSON, - for stdin")
    check.add_argument("--change", action="store_true", help="they are change events")
    check.add_argument(
        "--routing-key",
        metavar="KEY",
        help="stands for the routing key of events that have none, as X-Routing-Key does",
    )

    commands.add_parser(
        "serve",
        help="run the service: events in over HTTP, out on stdout",
        description="Run the service under gunicorn, on 0.0.0.0 and $PORT (8080 if unset)."
        " Each accepted event is one line of JSON on stdout; the log is on stderr.",
        usage="pagerduty-compat serve [GUNICORN OPTION ...]",
        epilog="Options are gunicorn's: --bind 127.0.0.1:9000, --workers 2, --certfile FILE"
        " --keyfile FILE, --print-config. `gunicorn --help` lists them all. --config FILE would"
        " replace the packaged settings.",
    )

    args, rest = parser.parse_known_args(argv)
    if args.command == "serve":
        return serve(rest)
    if rest:
        check.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        status = validate(args.files, change=args.change, routing_key=args.routing_key)
        sys.stdout.flush()
    except OSError as error:
        status = 2
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough, and it saw errors
            status = 1
        else:
            print(f"stdout: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    return status


def validate(files: Sequence[str], *, change: bool, routing_key: str | None) -> int:
    """Print what is wrong with the event in each file.

    Returns 0 if all are valid, 1 if one is refused, and 2 if a file cannot be read, in
    which case the others are judged all the same.
    """
    status = 0
    for file in files:
        try:
            body = _read(file)
        except OSError as error:
            print(f"{file}: {error.strerror}", file=sys.stderr)
            status = 2
            continue
        try:
            parse(body, change=change, routing_key=routing_key)
        except InvalidEvent as refusal:
            for sentence in refusal.errors:
                print(f"{file}: {sentence}")
            status = max(status, 1)
    return status


def _read(file: str) -> bytes:
    # One byte over the limit is enough to know that it is exceeded.
    if file == "-" and sys.stdin is not None:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    with open(0 if file == "-" else file, "rb") as stream:
        return stream.read(MAX_BYTES + 1)


def serve(options: Sequence[str]) -> int:
    """Become gunicorn's master, with the packaged settings; `options` are gunicorn's.

    Returns 2, with a line that says why, if it cannot start.
    """
    if None in map(find_spec, ("flask", "gevent", "gunicorn")):
        print("install what it needs: pip install 'pagerduty-compat[server]'", file=sys.stderr)
        return 2
    for option, harm in _REFUSED.items():
        if option in options:
            print(f"cannot start: {option} {harm}", file=sys.stderr)
            return 2
    try:
        settings = read_settings(os.environ)
        if settings.routing_keys_file:
            read_routing_keys(settings.routing_keys_file)
    except InvalidSetting as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    # glibc would keep for later what a burst of large events has taken. A fixed threshold makes
    # it give large blocks back.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "32768")
    config = "--config=python:pagerduty_compat.gunicorn_conf"
    command = [sys.executable, "-m", "gunicorn", config, APP, *options]
    return os.execv(sys.executable, command)


if __name__ == "__main__":
    raise SystemExit(main())
