"""How gunicorn runs the service, or any WSGI app: each setting with its reason.

Use it with `gunicorn -c python:pagerduty_compat.gunicorn_conf APP`, or through
`pagerduty-compat serve`; what is given on gunicorn's command line wins over it.

gunicorn's master imports this module. It pulls in neither flask nor jsonschema: what the
master has imported, a HUP does not load anew.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from select import PIPE_BUF, POLLOUT
from select import poll as select_poll
from typing import Any

from gunicorn import glogging, sock

_port = os.environ.get("PORT") or "8080"
if not re.fullmatch("[0-9]{1,5}", _port) or not 0 < int(_port) < 65536:
    print("cannot start: PORT must be a number from 1 to 65535", file=sys.stderr)
    raise SystemExit(2)

# Where a container is expected to listen; gunicorn's own default is loopback.
bind = f"0.0.0.0:{_port}"

# One process with greenlets: silent and slow clients cost memory, not a thread. gevent needs
# less CPU for a request than gthread here. gunicorn's own default is one sync worker, which
# any client that does not finish its request stops. Ours adds deadlines to gunicorn's gevent
# worker, and bounds on the bodies that are held at once.
worker_class = "pagerduty_compat.worker.GeventWorker"

# What a worker holds at most is in docs/operations.md. Each connection is a descriptor, and
# many a system starts its services with a limit of 1024.
worker_connections = 4000
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_hard, max(_soft, 8192)), _hard))

# The largest header of a request: gunicorn's defaults let each connection hold 800 KB.
limit_request_line = 4094
limit_request_fields = 40
limit_request_field_size = 4094

# Alertmanager keeps idle connections for 300 s, and counts one that the server closed first
# as a failed notification now and then.
keepalive = 320

# Shorter than the 30 s that Kubernetes waits before it kills.
graceful_timeout = 25

# The workers' heartbeat files must not sit on a disk that may stall, and with a read-only
# root there may be no other folder to write.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# It would need a home folder, which a service's user need not have.
control_socket_disable = True

# "auto" takes whatever gunicorn_h1c is installed, old and lenient ones too.
http_parser = "python"

# Nothing that a client says about a proxy is believed, from 127.0.0.1 neither: a SCRIPT_NAME
# header would make every path a 404.
forwarded_allow_ips = ""
forwarder_headers = ""


# What the workers must know of their common stdout, whatever becomes of each of them: two
# numbers, for pagerduty_compat.stdout. Made here, before the fork, and kept over HUPs, since
# gunicorn imports this module once. No lock may be made here: one that exists before gevent
# patches them freezes the worker.
stdout_state = memoryview(mmap.mmap(-1, 16)).cast("d")

# The digests of the routing keys that are served, or None for any. Kept here so that a HUP
# that finds a bad file leaves the old ones in force.
routing_keys: frozenset[bytes] | None = None

# The folder in which all workers count for Prometheus, and the place of this one there.
metrics_folder = ""
worker_slot: int | None = None


class Logger(glogging.Logger):
    """gunicorn's logger, on a stderr that it never waits for.

    What is asked to go to stdout, the access log, goes there too: stdout carries events alone.
    """

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for handler in (*self.error_log.handlers, *self.access_log.handlers):
            if isinstance(handler, logging.StreamHandler) and (
                handler.stream in (sys.stdout, sys.stderr)
            ):
                handler.setStream(_STDERR)

    def warning(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log a warning, without what gunicorn quotes of a request that it cannot read."""
        if isinstance(msg, str) and msg.startswith("Invalid request from ip="):
            msg = msg.partition(": ")[0]
        super().warning(msg, *args, **kwargs)


class _Stderr(io.TextIOBase):
    """stderr, where a line is lost if it cannot be written at once.

    A pipe that nobody reads would otherwise stop every request that has something to log.
    """

    lost = 0

    def write(self, text: str) -> int:
        line = text.encode(errors="backslashreplace")
        if self.lost:
            line = b"(%d lines of the log were lost)\n%s" % (self.lost, line)
        try:
            while line:
                poll = select_poll()  # the real one, gevent or not
                poll.register(2, POLLOUT)
                if poll.poll(0) != [(2, POLLOUT)]:
                    break
                line = line[os.write(2, line[:PIPE_BUF]) :]
        except OSError:
            pass
        self.lost = self.lost + 1 if line else 0
        return len(text)


_STDERR = _Stderr()
logger_class = Logger


def on_starting(server: Any) -> None:
    """Load the app in a child, before the port opens: what is wrong with it stops the start.

    In a worker it would be a traceback, or a worker forked again and again. Here it is one
    line on stderr and exit status 2; `--log-level debug` adds the traceback.
    """
    pid = os.fork()
    if pid == 0:
        logging.disable()  # what the app has to say at its start, the workers will say
        status = 0
        try:
            if server.cfg.daemon or server.cfg.capture_output:
                raise ValueError("--daemon and --capture-output would take events off stdout")
            if server.cfg.preload_app:
                raise ValueError("--preload would load the app before gevent is ready for it")
            if server.cfg.is_ssl:
                for file in filter(None, (server.cfg.certfile, server.cfg.keyfile)):
                    open(file).close()  # its error names the file
                sock.ssl_context(server.cfg)
            server.app.wsgi()
        except (Exception, SystemExit) as error:
            print(f"cannot start: {error}", file=sys.stderr)
            if server.cfg.loglevel == "debug":
                traceback.print_exc()
            status = 2
        sys.stderr.flush()
        os._exit(status)
    if os.waitpid(pid, 0)[1]:
        sys.exit(2)
    _read_routing_keys(server)
    settings = _settings().read_settings(os.environ)
    if server.cfg.workers > 1 and settings.calls_per_minute and not settings.redis_url:
        server.log.warning(
            "each of %d workers accepts %d events a minute of a routing key:"
            " PAGERDUTY_COMPAT_REDIS_URL would make them share the number",
            server.cfg.workers,
            settings.calls_per_minute,
        )


def when_ready(server: Any) -> None:
    """Make what the workers need, now that nothing can stop the start any more."""
    global metrics_folder
    metrics_folder = tempfile.mkdtemp(prefix="pagerduty-compat-", dir=worker_tmp_dir)


def on_reload(server: Any) -> None:
    """Read the routing keys again, before new workers start."""
    _read_routing_keys(server)


def _read_routing_keys(server: Any) -> None:
    global routing_keys
    module = _settings()
    if file := module.read_settings(os.environ).routing_keys_file:
        try:
            routing_keys = module.read_routing_keys(file)
        except module.InvalidSetting as error:
            server.log.error("%s: the routing keys stay as they were", error)


def _settings() -> Any:
    """Return the module as it is now, and forget it: a HUP is to load it anew."""
    name = f"{__package__}.settings"
    module = importlib.import_module(name)
    del sys.modules[name]
    return module


def pre_fork(server: Any, worker: Any) -> None:
    """Give a worker a place among those that live: it counts on from a dead one's numbers."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(slot for slot in itertools.count() if slot not in taken)


def post_fork(server: Any, worker: Any) -> None:
    """Tell the worker's own process of its place, and let it be stopped while it starts."""
    global worker_slot
    # It would go on with the master's handler, which remembers the signal and does nothing.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker_slot = worker.slot
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder


def on_exit(server: Any) -> None:
    """Remove what only this run needed."""
    shutil.rmtree(metrics_folder, ignore_errors=True)


def post_worker_init(worker: Any) -> None:
    """Leave Ctrl-C to the master, which stops its workers: they would be stopped twice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_int(worker: Any) -> None:
    """Leave at once when told to do so, as after Ctrl-C.

    gunicorn would go on for a tenth of a second; a gevent worker whose main loop ends in that
    time leaves a traceback.
    """
    os._exit(0)
