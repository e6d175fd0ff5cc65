"""Options of the HTTP server: those of its engine, what requests may ask, who may ask how much."""

from dataclasses import dataclass

from headway.config.bounds import above_zero, at_least
from headway.config.engine import EngineConfig
from headway.config.errors import UsageError


@dataclass(frozen=True)
class ServerConfig(EngineConfig):
    """What a server is told, beside its model and its keys."""

    name: str = ""
    """Name of the model in requests; empty takes that of its folder."""
    chat_template: str = ""
    """File with a Jinja chat template; empty takes the model's."""
    max_tokens: int = 0
    """Most tokens of a reply; 0: what the context holds."""
    max_n: int = 64
    """Most replies to one prompt, and prompts of one request."""
    max_waiting: int = 256
    """Most replies that wait; past it requests get 429."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, then use a key."""
    port: int = 8000
    """Port; 0 takes a free one."""
    max_connections: int = 4096
    """Most connections; further ones are closed."""
    max_body: int = 4 * 2**20
    """Most bytes of a request."""
    body_timeout: float = 10.0
    """Seconds in which a request has to arrive, and a client has to take some of what is sent."""
    drain: float = 30.0
    """Seconds that running replies have after SIGTERM."""

    def check(self) -> None:
        """Raise UsageError for a number out of its range."""
        super().check()
        at_least(0, "", vars(self), "max_tokens max_waiting port drain")
        at_least(1, "", vars(self), "max_n max_connections max_body")
        above_zero("", vars(self), "body_timeout")
        if self.port > 65535:
            raise UsageError(f"port={self.port} is above 65535; use 0 for a free one")
