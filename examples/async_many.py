"""Generate many prompts concurrently with asyncio; one failure does not affect the others."""

import asyncio
import itertools

from darkroom_client import AsyncClient, DarkroomError, GenerationRequest

SIZES = ("small", "large")
COLOURS = ("red", "green", "yellow")
SHAPES = ("circle", "star")


async def main() -> None:
    """Generate every combination, four at a time, and save the images."""
    requests = [
        GenerationRequest(prompt=f"a {size} {colour} {shape} on a blue background", seed=7)
        for size, colour, shape in itertools.product(SIZES, COLOURS, SHAPES)
    ]
    async with AsyncClient() as client:
        await client.wait_until_ready(timeout=60)
        answers = await client.generate_many(requests, concurrency=4)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, DarkroomError):
            print(f"{request.prompt}: {answer}")
        else:
            path = answer.images[0].save(f"{request.prompt.replace(' ', '-')}.png", overwrite=True)
            print(f"{path}  {answer.timings.total:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
