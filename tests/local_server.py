"""What servers for tests have in common: they serve on a loopback port until the end of the `with` block."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Serves with the class of request handlers that `handler` gives; its address, with `path`, is in `url`."""

    path = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        raise NotImplementedError

    def __enter__(self):
        quiet = type("Quiet", (self.handler(),), {"log_message": lambda *args: None})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}{self.path}"
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
