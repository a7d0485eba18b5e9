"""The API server: limits and clean errors around LLaMA-Factory's app, and a deadline for a request's head.

See `swaps.API_SWAPS`.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

from llamafactory.extras import logging

from .. import upstream

logger = logging.get_logger("llamafactory." + __name__)


def guarded_app(original):
    """Replaces llamafactory.api.app.create_app. Raises UserError at once for limits that are no numbers."""
    from ..serving.guard import Guard, Limits, error_body  # here: other commands need no web client

    limits = Limits.from_environment(os.environ)

    @functools.wraps(original)
    def create_app(chat_model):
        from fastapi.exceptions import RequestValidationError
        from llamafactory.api.common import check_lfi_path, check_ssrf_url
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import Response

        def answer(status: int, message: str, headers=None) -> Response:
            return Response(error_body(status, message), status, headers, media_type="application/json")

        async def refused(request, error: HTTPException) -> Response:
            return answer(error.status_code, str(error.detail), error.headers)

        async def not_valid(request, error: RequestValidationError) -> Response:
            problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
            return answer(422, "; ".join(problems[:5]))

        async def failed(request, error: Exception) -> Response:
            return answer(500, "The server failed while it answered; its log says why.")

        app = original(chat_model)
        key = os.environ.get("API_KEY", "")
        # the last, behind the headers for other origins: a page must be able to read why it was refused
        app.user_middleware.append(
            Middleware(Guard, limits=limits, key=key, check_file=check_lfi_path, check_address=check_ssrf_url)
        )
        for kind, handler in ((HTTPException, refused), (RequestValidationError, not_valid), (Exception, failed)):
            app.add_exception_handler(kind, handler)
        return app

    return create_app


def patient_server(original):
    """Replaces the module uvicorn in llamafactory.api.app, of which it calls `run`."""
    from ..serving.guard import Limits, error_body

    if other := upstream.other_versions(upstream.API_WRITTEN_FOR):
        logger.warning_rank0(f"{other} requirements.txt has the versions that were run together.")
    seconds = Limits.from_environment(os.environ).seconds
    late = error_body(408, f"The head of the request was not whole after {seconds:g} s.")
    protocol = upstream.http_with_deadline(seconds, late)
    return SimpleNamespace(run=functools.partial(original.run, http=protocol, ws="none"))
