"""What the server takes before it refuses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on requests and on what is kept between them.

    Memory for bodies is at most `max_queue * max_body_bytes`; decoded pictures live only while
    one of `workers` threads hands them to the model.

    Attributes:
      max_body_bytes: of a request's body; more is answered with 413 while it arrives.
      max_images: pictures in one request, its whole history included.
      max_pixels: width times height of one picture, read from its header before it is decoded.
      max_queue: requests accepted at once, running and waiting; more are answered with 429. A
        request for n choices counts n times.
      max_choices: largest n, the replies to one request.
      max_tokens_default: tokens to generate where the request does not say.
      timeout_s: seconds from a complete body to the last token; then 504 and the work is cancelled.
      body_timeout_s: seconds that a body may take to arrive; then 408.
      kept_conversations: finished conversations that wait for their next turn, so that it sends the
        model only what is new; the least recently used is closed first. 0 keeps none.
      workers: threads that parse requests, decode pictures and submit.
    """

    max_body_bytes: int = 64 * 2**20
    max_images: int = 16
    max_pixels: int = 4096 * 4096
    max_queue: int = 256
    max_choices: int = 8
    max_tokens_default: int = 1024
    timeout_s: float = 600.0
    body_timeout_s: float = 60.0
    kept_conversations: int = 64
    workers: int = 4

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("kept_conversations", "max_images") else 1
            if value < least and not (field.name.endswith("_s") and value > 0):
                wanted = "above 0" if field.name.endswith("_s") else f"at least {least}"
                raise ValueError(f"{field.name} is {value}; it must be {wanted}")
