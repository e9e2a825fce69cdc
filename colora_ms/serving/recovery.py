"""Who is to blame when the engine fails, and what a request is told.

When a graph fails, all requests begin anew on new graphs; those that were in the failed call are *doubtful* and run
alone, one after the other, until they are past the place. One that fails alone ends; the others were its neighbours.
"""

from colora_ms.errors import AdapterError, DecodingError, ServingError

#: Graphs that may fail around a request that does not fail alone; then it ends, so that nothing is tried for ever.
MOST_DOUBTS = 4


def cohort(requests):
    """Who may share the next graph call: all, or one doubtful request alone."""
    return next(([request] for request in requests if request.doubtful is not None), list(requests))


def blame(requests, chunk):
    """Mark the requests that were in a failed call as doubtful; returns those that are to end.

    Args:
        chunk: steps that the call made at most.
    """
    for request in requests:
        request.doubts += 1
        request.doubtful = len(request.tokens) + chunk if request.prompt_done else 0
    return [request for request in requests if len(requests) == 1 or request.doubts > MOST_DOUBTS]


def clear(request):
    """Take the doubt from a request that is past the place where a graph failed."""
    if request.doubtful is not None and request.prompt_done and len(request.tokens) >= request.doubtful:
        request.doubtful = None


def failure(error):
    """What a request is told when the engine failed at it."""
    reason = ServingError(f"the engine failed while the request ran: {error}")
    reason.__cause__ = error
    return reason


def not_finite(request):
    """What a request is told whose scores are infinite or not a number."""
    contrast = request.settings.contrast
    if contrast is not None and contrast.beta > 1e6:
        return DecodingError(f"beta={contrast.beta:g} makes the scores of the contrast infinite; 0.5 is a usual value")
    if request.adapter is None:
        return ServingError("the base model's logits are not finite; its weights are damaged")
    return AdapterError(f"adapter {request.adapter!r} makes the model's logits infinite or not a number; its values are "
                        "too large: train it again with a smaller step")
