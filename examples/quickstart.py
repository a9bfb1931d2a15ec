"""The shortest program that generates an image: start `darkroom-server serve`, then run this."""

from darkroom_client import Client

with Client("127.0.0.1:50051") as client:
    result = client.generate("a large yellow star on a blue background", steps=20, seed=7)
    result.images[0].save("star.png", overwrite=True)
