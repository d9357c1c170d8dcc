"""Flower: the federated rounds of `adadagrad.federated` between machines, or in Flower's simulation.

Needs the extra ``flower``. The strategy runs in Flower's ServerApp, `client_app` makes the ClientApp:

    server_app = ServerApp()

    @server_app.main()
    def main(grid, context):
        model = make_model()
        server = Server(model, OverTheAirAdam(model.parameters(), lr=0.01), Channel(seed=0))
        OverTheAir(server, num_clients=10).run(grid, rounds=100)

    client = client_app(make_model, make_dataset, loss)

What is sent are the trainable parameters one way and a message of the same shapes the other. Buffers and frozen
parameters stay where they are: the server's in the server's model, a client's as `make_model` makes them.

For the same seeds, clients and numbers of threads the weights are bit for bit those of `adadagrad.federated.simulate`.
"""

from adadagrad.core.errors import MissingExtra

try:
    import flwr as _flwr  # noqa: F401
except ImportError as missing:
    raise MissingExtra("flwr", "flower") from missing

from adadagrad.integrations.flower.client import client_app
from adadagrad.integrations.flower.strategy import OverTheAir

__all__ = ["OverTheAir", "client_app"]
