"""Hugging Face Inference Endpoints call this file, which lies beside the weights of a published model."""

import base64
import binascii
from typing import Any

from transformers import pipeline

# The first two are those of the task "audio-classification" on Inference Endpoints.
PARAMETERS = (
    *("top_k", "function_to_apply", "return_label_values", "return_intervals", "return_spread"),
    *("sampling_rate", "speakers", "channel", "split_channels", "chunk_length_s"),
)


class EndpointHandler:
    """Answers the requests of an endpoint; `path` is the folder of the model, as the endpoint has downloaded it."""

    def __init__(self, path: str = ""):
        self.pipeline: Any = pipeline("audio-classification", model=path, trust_remote_code=True, revision="main")

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer a request.

        Args:
            data: `"inputs"`, the bytes of an audio file or, in a JSON request, their base64 text, or a list of samples,
                or, with speakers, a list of such texts, the turns of a conversation; and, if wanted, `"parameters"`:
                arguments of the pipeline, see `PARAMETERS`; speakers are a name or null a turn. Strings are never taken
                as paths or URLs.

        Returns:
            `[{"label": "arousal", "score": 0.61}, ...]`, highest first, on the unit scale; what the pipeline gives for
            each turn where speakers, split_channels or chunk_length_s make several.

        Raises:
            ValueError: inputs or parameters that cannot be used; the message says what can.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters is {type(parameters).__name__}; names and values are needed")
        parameters = dict(parameters)
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            raise ValueError(f"parameters {unknown} are not known; allowed are {', '.join(PARAMETERS)}")
        inputs: Any = data.get("inputs")
        texts = isinstance(inputs, list) and bool(inputs) and all(isinstance(turn, str) for turn in inputs)
        if texts != (parameters.get("speakers") is not None):
            raise ValueError("a conversation is a list of base64 texts, with speakers: a name or null for each")
        if texts:
            return self.pipeline([_decoded(turn) for turn in inputs], **parameters)
        if isinstance(inputs, str):
            inputs = _decoded(inputs)
        elif isinstance(inputs, list):
            inputs = {"array": inputs, "sampling_rate": parameters.pop("sampling_rate", None)}
        elif not isinstance(inputs, (bytes, bytearray)):
            raise ValueError(f"inputs is {type(inputs).__name__}; send the bytes of an audio file")
        return self.pipeline(inputs, **parameters)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("inputs holds a text that is no base64; send the bytes of an audio file") from error
