"""``darkroom submit``: start jobs, and print their ids."""

import argparse
import dataclasses
import json

from darkroom_client.cli._connect import connect
from darkroom_client.cli.commands._plan import prompts_of, seeded_request
from darkroom_client.cli.terminal._console import open_console


def run(arguments: argparse.Namespace) -> int:
    """Submit a job for each prompt, and print its id when the server has accepted it."""
    requests = [seeded_request(prompt, arguments) for prompt in prompts_of(arguments)]
    console = open_console()
    with connect(arguments) as client:
        for request in requests:
            accepted = client.submit(request, time_limit=arguments.time_limit)
            if arguments.json:
                values = {"prompt": request.prompt, **dataclasses.asdict(accepted)}
                print(json.dumps(values), flush=True)
            else:
                console.print(accepted.request_id)
    return 0
