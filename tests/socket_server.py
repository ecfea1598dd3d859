"""A server of raw bytes, for what no HTTP server would say."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class SocketServer:
    """Calls ``serve`` with each connection and how many there were before, in a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket, int], None]) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.connections = 0
        self._serve = serve
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            threading.Thread(target=self._one, args=(peer, number), daemon=True).start()

    def _one(self, peer: socket.socket, number: int) -> None:
        with peer, contextlib.suppress(OSError):
            self._serve(peer, number)

    def close(self) -> None:
        # Ends the accept() that waits, too.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
