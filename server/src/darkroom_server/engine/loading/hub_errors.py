"""What the hub's errors mean, and what the operator can do about each."""

from http import HTTPStatus

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from darkroom_server.core.engine_config import ModelSource


def explain(error: Exception, source: ModelSource) -> tuple[str, str] | None:
    """Why the hub does not provide the model, and the remedy; None if the error does not say.

    The hub answers 401 for a model that does not exist too, if the caller has no token.
    """
    match error:
        case GatedRepoError():
            return (
                "access to it is restricted",
                "accept its licence on the hub, and set HF_TOKEN to a token of that account",
            )
        case RepositoryNotFoundError():
            return (
                "there is no such model, or it is private",
                "check its name and HF_TOKEN, or give a folder",
            )
        case RevisionNotFoundError():
            return (
                f"it has no revision {source.revision or 'main'!r}",
                "check the branch, tag or commit after @",
            )
        case RemoteEntryNotFoundError():
            return "it has no model_index.json", "give a pipeline, as diffusers saves it"
        case HfHubHTTPError() if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            return "the hub does not accept the token", "check HF_TOKEN"
        case ValueError() if source.variant and f"variant={source.variant}" in str(error):
            return f"it has no weights of variant {source.variant!r}", "leave --variant out"
    return None
