"""The demo model's adapters, and tasks with images, do what they say, in mixed batches."""

from darkroom_client import Client
from training.adapters.evaluate import generate, requests_of, shares
from training.adapters.trials import KINDS, trials

COUNT = 4
STEPS = 8


def test_the_server_offers_the_adapters_of_its_demo_model(address: str) -> None:
    with Client(address, insecure=True) as client:
        (model,) = client.models()
        offered = {adapter.id: adapter for adapter in client.adapters()}
    assert offered.keys() == {"outline", "night", "position"}
    assert all(adapter.models == (model.id,) for adapter in offered.values())
    assert not any(adapter.rejection for adapter in offered.values())


def test_pictures_show_what_was_asked_and_those_of_the_controls_do_not(address: str) -> None:
    judged = {kind: trials(kind, COUNT) for kind in KINDS}
    requests = [request for each in judged.values() for request in requests_of(each)]
    with Client(address, insecure=True) as client:
        pictures = generate(client, requests, STEPS)
    found = {}
    for number, (kind, each) in enumerate(judged.items()):
        found[kind] = shares(each, pictures[2 * COUNT * number :][: 2 * COUNT])
    # One picture of each kind may be wrong; the card has the shares of 50.
    assert all(share["right"] >= 1 - 1 / COUNT for share in found.values()), found
    assert all(share["controls"] <= 1 / COUNT for share in found.values()), found
