"""Runs the application until it is asked to stop."""

import signal
import socket

import uvicorn
from starlette.applications import Starlette


def make_server(app: Starlette, grace_s: int = 30) -> uvicorn.Server:
    """Return the HTTP server of `app`, not yet running.

    On shutdown, requests that are being answered have `grace_s` seconds to end.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # what the tests run, whatever else is installed
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=60,  # clients that wait between turns keep their connection
        timeout_graceful_shutdown=grace_s,
    )
    return uvicorn.Server(config)


def serve(app: Starlette, host: str = "127.0.0.1", port: int = 8000, grace_s: int = 30) -> None:
    """Serve until SIGINT or SIGTERM, then return once running requests are answered.

    A second SIGINT does not wait for them. Must be called in the main thread.

    Raises:
      OSError: nothing can listen at this address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error}") from error
    server = make_server(app, grace_s)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal again when it is done, which would end the process here, before
    # its caller has closed the model
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in signals]
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        listener.close()
